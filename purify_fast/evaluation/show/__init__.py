"""How a report is shown: tables and sentences in Markdown and on a terminal, an HTML page, pictures."""
