"""A data set for test_threads.py, in a file that the processes of a data loader can import."""

import torch
from torch.utils.data import Dataset


class Purified(Dataset):
    """Images that a defence purifies in the loader's processes."""

    def __init__(self, defence):
        self.defence = defence

    def __len__(self):
        return 6

    def __getitem__(self, i):
        torch.set_num_threads(1)
        with torch.no_grad(), self.defence.fixed_noise(i):
            return self.defence(torch.full((1, 1, 16, 16), i / 10))[0]
