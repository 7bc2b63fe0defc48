"""A plan at work: who does what and when, one stage in one process, what its end means."""
