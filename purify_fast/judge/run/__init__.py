"""The run of an evaluation: attacks, batch by batch and shared among processes, whose images are judged and cached."""
