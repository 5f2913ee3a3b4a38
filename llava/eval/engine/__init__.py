"""Running a benchmark: what is asked, answering it, what is written."""
