"""What runs a stack and keeps it: rows, training, models and bundles on disk."""
