"""Count the adversarial examples that attacks miss, on small networks for which the correct answer is known.

There are three kinds of networks. For networks of the first kind, it is decided exactly whether each image has an
adversarial example. Networks of the second kind were trained to hide a known adversarial example. Networks of the third
kind are robust by construction.
"""
