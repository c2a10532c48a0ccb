"""What the tests of several criteria share: a stand-in for the network's output, and a batch."""

import torch
import torch.nn.functional as F

from affscl.model.network import Output

K, D, B = 5, 8, 12  # clusters, length of a feature, crops in a batch


def outputs(x):
    """What a network would return whose pooled features are x."""
    return Output(x, F.batch_norm(x, None, None, training=True), F.normalize(x, dim=1))


def world(seed=0):
    """Two tables of unit rows, a batch (a leaf tensor) and its targets, all features and their labels with outliers."""
    g = torch.Generator().manual_seed(seed)
    rows, hard = (F.normalize(torch.randn(K, D, generator=g), dim=1) for _ in range(2))
    targets = torch.randint(0, K, (B,), generator=g)
    x = torch.randn(B, D, generator=g).requires_grad_()
    features = F.normalize(torch.randn(40, D, generator=g), dim=1)
    labels = torch.cat([torch.arange(K), torch.randint(-1, K, (40 - K,), generator=g)])
    return rows, hard, x, targets, features, labels
