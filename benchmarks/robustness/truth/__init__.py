"""Count the adversarial examples that attacks miss, on small networks for which the correct answer is known.

There are three kinds of networks. For the first, each image is decided exactly: it has an adversarial example or not.
The second were trained to hide a known adversarial example. The third are robust by construction.
"""
