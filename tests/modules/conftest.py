"""What tests of torch modules share."""

import pytest


@pytest.fixture
def one_torch_thread():
    """torch in one thread, for tests of small tensors: where cores are shared, waiting for a second one takes far longer."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
