"""Studies under configs/experiments: their questions, the rows that their runs leave, the page."""
