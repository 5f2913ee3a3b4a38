"""Writers of what people read about results: tables, plots, pictures."""
