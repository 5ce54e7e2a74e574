"""Tables and plots."""

from .inspection import INDEX, write_report, write_study
from .pareto import pareto_plot
from .table import markdown_table, rich_lengths, rich_table

__all__ = ["INDEX", "markdown_table", "pareto_plot", "rich_lengths", "rich_table", "write_report", "write_study"]
