"""The store under `outputs/` as a whole: what is wrong in it, what mends it, what it may free."""
