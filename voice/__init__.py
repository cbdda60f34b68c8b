"""What test_model.py loads and samples with, and its report: one module for each question."""
