"""Small trained models that come with the package, to be attacked within a minute of installing it.

    from purify_fast import zoo

    zoo.list()                                  # their names
    model = zoo.load("digits-carso-pipeline")   # images in [0, 1] to logits, in evaluation mode
    print(zoo.card("digits-carso-pipeline"))    # how it was trained, and what it withstands

A model's card names the protocols that attacked it, on how many images, and what each left. Whoever gets
it lower is asked to report how.
"""

from .cards import Accuracy, Card, card, classifier_folder, folder, list, load

__all__ = ["Accuracy", "Card", "card", "classifier_folder", "folder", "list", "load"]
