"""What may happen to a Program."""
