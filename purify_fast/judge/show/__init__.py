"""The report and its forms: text for a terminal, Markdown, an HTML page, and pictures."""
