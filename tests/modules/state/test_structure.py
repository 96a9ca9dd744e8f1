"""Structures of modules: whatever changes what a module computes changes its address, and nothing else does."""

import functools
import os
import subprocess
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from ntkdask.errors import InputError  # noqa: E402
from ntkdask.modules.state import shipping  # noqa: E402
from ntkdask.networks import convolutional  # noqa: E402
from ntkdask.workflows.ship import shipped  # noqa: E402


class Acting(nn.Linear):
    """A linear layer and a function of what it gives."""

    def __init__(self, act):
        super().__init__(3, 2)
        self.act = act
        with torch.no_grad():
            self.weight.fill_(0.5)
            self.bias.fill_(0.25)

    def forward(self, x):
        return self.act(super().forward(x))


class Power:
    """A callable object."""

    def __init__(self, p):
        self.p = p

    def __call__(self, x):
        return x**self.p


def scaled(factor, power=2):
    return lambda x: factor * x**power


def local_class(power):
    class Act(nn.Module):
        def __init__(self):
            super().__init__()
            self.eval()

        def forward(self, x):
            return x**power

    return Act()


def constant(value):
    """Two layers of one class name, whose code differs."""
    if value:

        class Act(nn.Module):
            def forward(self, x):
                return x + 1
    else:

        class Act(nn.Module):
            def forward(self, x):
                return x - 1

    return Act()


def unregistered(value):
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(value)
        layer.bias.fill_(0)
    return [layer]


PAIRS = {
    "lambdas": (lambda x: x**2, lambda x: x**3),
    "functions of functions": (scaled(2), scaled(3)),
    "defaults": (lambda x, p=2: x**p, lambda x, p=3: x**p),
    "what a lambda calls": (lambda x: torch.tanh(x), lambda x: torch.sin(x)),
    "partials": (functools.partial(torch.pow, exponent=2), functools.partial(torch.pow, exponent=3)),
    "objects": (Power(2), Power(3)),
    "methods of objects": (Power(2).__call__, Power(3).__call__),
    "classes of functions": (local_class(2), local_class(3)),
    "code of a class": (constant(0), constant(1)),
    "namespaces": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    "dtypes": (torch.float32, torch.float64),
    "devices": (torch.device("cpu"), torch.device("meta")),
    "sets": ({"a", "b"}, {"a", "c"}),
    "numbers of NumPy": (np.float32(1), np.float32(2)),
    "complex numbers": (1j, 2j),
    "bytes": (b"a", b"b"),
    "slices": (slice(1), slice(2)),
    "nested lists": ([[[[1]]]], [[[[2]]]]),
    "tensors in lists": ([torch.ones(2)], [torch.zeros(2)]),
    "layers in lists": (unregistered(1), unregistered(2)),
    "modules of Python": (np, torch),
}


def address(act):
    return shipping.described(Acting(act)).structure


@pytest.mark.parametrize("name", PAIRS)
def test_the_address_sees_what_an_attribute_is(name):
    one, other = PAIRS[name]
    assert address(one) == address(one)
    assert address(one) != address(other)


@pytest.mark.parametrize("make", [lambda: scaled(2), lambda: Power(2), lambda: local_class(2), lambda: unregistered(1)])
def test_equal_attributes_are_equal(make):
    assert address(make()) == address(make())


def test_the_copy_that_travels_has_the_same_address():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    for module in (Acting(scaled(2)), Acting(local_class(2)), Acting([{"a": Power(2)}]), traced):
        again = shipping.filled(shipping.skeleton_of(module), shipping.weights_of(module))
        assert shipping.described(again) == shipping.described(module)


def test_what_refers_to_itself_ends():
    module, other = Acting(None), Acting(None)
    for m in (module, other):
        m.act, loop = m.forward, [m]
        loop.append(loop)
        m.loop = loop
    assert shipping.described(module) == shipping.described(other)


def test_modules_that_differ_in_a_lambda_alone_are_kept_apart(tmp_path):
    x = torch.ones(1, 3)
    for act, expected in ((lambda x: x**2, 1.75**2), (lambda x: x**3, 1.75**3)):
        stored = shipped(Acting(act), tmp_path)
        torch.testing.assert_close(stored.build()(x), torch.full((1, 2), expected))


def test_addresses_are_equal_in_other_processes():
    """Of lambdas and classes of __main__ and sets, whose order follows the process's hashes."""
    code = (
        "import torch; from torch import nn; from ntkdask.modules.state import shipping\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.kinds = {'relu', 'tanh', 'gelu'}; self.act = lambda x: x**{power}\n"
        "    def forward(self, x):\n"
        "        return {form}\n"
        "print(shipping.described(Net()).structure)"
    )

    def found(seed, power=2, form="self.act(x)"):
        return subprocess.run(
            [sys.executable, "-c", code.replace("{power}", str(power)).replace("{form}", form)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
        ).stdout

    first = found(1)
    assert first == found(2)
    assert first != found(1, power=3)
    assert first != found(1, form="self.act(x) + 1")


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_no_part_of_a_module(wrap):
    module = Acting(torch.tanh)
    wrapped = wrap(module)
    assert shipping.described(wrapped) == shipping.described(module)
    again = shipping.filled(shipping.skeleton_of(wrapped), shipping.weights_of(wrapped))
    assert type(again) is Acting


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_has_no_structure_or_numbers_is_refused():
    with pytest.raises(InputError, match="itself is a ScriptModule, which does not travel"):
        shipping.skeleton_of(torch.jit.script(nn.Linear(3, 2)))
    with pytest.raises(InputError, match="meta device, which has no numbers"):
        shipping.described(nn.Linear(3, 2, device="meta"))


RECORDED = {"fcn": "41626e0b3328022c", "resnet": "3c8eef5368c440c9", "wide": "3e34a77be26e9870"}
"""Digests of structures as the first release recorded them: stored runs are found again by these."""


def test_structures_are_recorded_under_names_that_do_not_move():
    """A file of this package may move; the fingerprints of its networks stay."""
    from ntkdask.modules import ResNet18, WideResNet, descriptions

    made = {
        "fcn": descriptions.FiniteNetwork(convolutional(2, activation="gelu"), 4, 3, (4, 4, 3)).build(),
        "resnet": ResNet18(width=2).build(),
        "wide": WideResNet().build(),
    }
    assert {name: shipping.described(module).structure for name, module in made.items()} == RECORDED


def test_layers_of_this_package_state_the_name_they_are_recorded_under():
    from ntkdask.modules import finite, residual

    for home in (finite, residual):
        layers = [
            c
            for c in vars(home).values()
            if isinstance(c, type) and issubclass(c, nn.Module) and c.__module__ == home.__name__
        ]
        assert layers
        for layer in layers:
            assert vars(layer)["recorded_as"] == f"ntkdask.modules.{home.__name__.rsplit('.')[-1]}.{layer.__name__}"
