"""Memory of large results and scratch serves the next: no result is touched while somebody holds it, and what is idle is bounded."""

import json
import platform

import pytest
import torch

from cmoe_kernels import native
from tests import forked

pytestmark = [
    pytest.mark.skipif(native.library is None, reason=str(native.error)),
    pytest.mark.skipif(platform.system() != "Linux", reason="malloc's memory elsewhere"),
    pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.11 and newer take memory of others"),
]
HEAD = """
import json, os, resource, threading, torch, cmoe_kernels as cmoe
torch.set_num_threads(1)

def result(megabytes, value=1.0):
    # Every element of the result is 2 * value.
    x, w = torch.full((megabytes << 8, 2), value), torch.ones(1, 1024, 2)
    return cmoe.grouped_linear(x, w, None, torch.tensor([0, x.shape[0]], dtype=torch.int32))

def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() >> 20
"""


def python(code: str, **environment: str):
    run = forked.run(HEAD + code, **environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout)


REUSE = """
a = result(40)
first = a.data_ptr()
b = result(40, 2.0)  # while a is held
view = a[7:9]
del a
c = result(40, 3.0)  # a view holds a's memory, too
apart = len({first, b.data_ptr(), c.data_ptr()}) == 3 and bool((view == 2).all() and (b == 4).all() and (c == 6).all())
del view
d = result(39, 4.0)
print(json.dumps([apart, d.data_ptr() == first, first % (2 << 20) == 0, bool((d == 8).all() and (b == 4).all() and (c == 6).all())]))
"""


def test_memory_is_used_again_once_nobody_holds_it():
    assert python(REUSE) == [True, True, True, True]


def test_the_setting_takes_mallocs_memory():
    apart, _, aligned, values = python(REUSE, CMOE_KEEP_PAGES="0")
    assert apart
    assert values
    assert not aligned


def test_idle_memory_is_bounded_by_what_was_in_use_at_one_time():
    code = """
result(200)
start, most = mapped(), 0
for megabytes in (40, 60, 90, 130, 180, 50, 70, 100, 150, 200):
    result(megabytes)
    most = max(most, mapped() - start)
held = [result(50) for _ in range(4)]
print(json.dumps([most, mapped() - start]))
"""
    one_at_a_time, four = python(code)
    assert one_at_a_time <= 200 // 4 + 8
    assert four <= 200 // 4 + 8


def test_idle_memory_makes_room_where_memory_ends():
    code = """
result(300)
resource.setrlimit(resource.RLIMIT_AS, ((mapped() + 100) << 20,) * 2)
y = result(380)
print(json.dumps(bool(y[0, 0] == 2 and y[-1, -1] == 2)))
"""
    assert python(code)


def test_threads_do_not_share_a_result():
    code = """
wrong = []
def work(value):
    for i in range(6):
        y = result(33 + i % 3, value)
        if not (y == 2 * value).all():
            wrong.append(value)
threads = [threading.Thread(target=work, args=(float(v),)) for v in range(1, 5)]
[t.start() for t in threads]
[t.join() for t in threads]
print(json.dumps(wrong))
"""
    assert python(code) == []


def test_a_forked_child_has_its_own():
    code = """
kept = result(40)
result(50)
child = os.fork()
if not child:
    mine = [result(50, 5.0), result(40, 6.0)]
    os._exit(0 if (mine[0] == 10).all() and (mine[1] == 12).all() and (kept == 2).all() else 1)
again = result(50, 7.0)
_, status = os.waitpid(child, 0)
print(json.dumps([status, bool((again == 14).all() and (kept == 2).all())]))
"""
    assert python(code) == [0, True]


def test_gradients_are_the_same_bits_and_serve_steps():
    """Three steps of training; .grad is handed over, added to, dropped, saved and loaded as any tensor is."""
    code = """
import hashlib, io
torch.manual_seed(0)
x, gates = torch.randn(3, 1536), torch.rand(3, 2, requires_grad=True)
w1, w2 = (torch.randn(2, o, i).mul_(0.02).requires_grad_() for o, i in ((4096, 1536), (1100, 4096)))
said = hashlib.sha256()
for step in range(3):
    cmoe.soft_experts(x, gates, w1, None, w2, None).square().sum().backward()
    if step == 1:
        cmoe.soft_experts(2 * x, gates, w1, None, w2, None).square().sum().backward()
    file = io.BytesIO()
    torch.save(w1.grad, file)
    file.seek(0)
    for gradient in (torch.load(file), w2.grad, gates.grad):
        said.update(gradient.numpy().tobytes())
    with torch.no_grad():
        for p in (w1, w2, gates):
            p -= 1e-3 * p.grad
            p.grad = None
print(json.dumps(said.hexdigest()))
"""
    assert python(code) == python(code, CMOE_KEEP_PAGES="0")
