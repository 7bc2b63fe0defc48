"""What makes a sweep repeatable: its lock, what differs from it here, what a rerun comes to."""
