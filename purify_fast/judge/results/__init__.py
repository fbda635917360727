"""The results of an evaluation: the rows of the report, and the images that fell."""
