"""Tables of papers as data: what was published, what is measured here, and the gap between them."""

from llava.eval.tables.spec import Table, TableError, list_tables, load_table

__all__ = ["Table", "TableError", "list_tables", "load_table"]
