"""The forms of a report: text for a terminal, Markdown, an HTML page, and pictures."""
