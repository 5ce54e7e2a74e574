"""Tables and plots."""

from .pareto import pareto_plot
from .table import markdown_table, rich_table

__all__ = ["markdown_table", "pareto_plot", "rich_table"]
