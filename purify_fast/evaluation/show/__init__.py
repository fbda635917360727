"""The presentation of a report: tables and sentences in Markdown and on a terminal, an HTML page, pictures."""
