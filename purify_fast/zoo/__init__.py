"""Small trained models to attack. Those on digits come with the package, and others are downloaded at the first use.

    from purify_fast import zoo

    zoo.list()                                  # the names of the models
    model = zoo.load("digits-carso-pipeline")   # a module from images in [0, 1] to logits, in evaluation mode
    print(zoo.card("digits-carso-pipeline"))    # the model's training, and its accuracy under attack

If you find an attack that lowers an accuracy, please report the attack.
"""

from .cards import Accuracy, Card, card, classifier_folder, folder, list, load

__all__ = ["Accuracy", "Card", "card", "classifier_folder", "folder", "list", "load"]
