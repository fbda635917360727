"""A report as one HTML page that needs nothing else: styles, drawings and pictures are inside it.

Building it needs jinja2, which comes with PyTorch and with the extra ``report``.
"""

from .build import html_page, page_file, write_page

__all__ = ["html_page", "page_file", "write_page"]
