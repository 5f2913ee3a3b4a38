"""What is written about results: tables, plots, pictures."""
