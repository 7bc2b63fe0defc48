"""The store under `outputs/`: records, who works on what, what is wrong in it and what mends it."""
