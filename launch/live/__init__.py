"""The report as a page that grows while runs train."""
