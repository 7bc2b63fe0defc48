"""The W&B mirror of records, beside a sweep or replayed."""
