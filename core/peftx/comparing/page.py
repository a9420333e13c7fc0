from __future__ import annotations
from peftx.comparing.table import Table
def page(table: Table) -> str:
    return ""
