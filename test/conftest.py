"""SHARD=2/3 runs the second third of the tests, every third one; those that must have the GPU for themselves, marked
`alone`, run under SHARD=alone only. Without SHARD all run. With TRAIN_DEVICE=gpu those marked `host_only` are left out."""
import os


def pytest_configure(config):
    config.addinivalue_line("markers", "alone: measures what the whole GPU has, so nothing else may run on it")
    # A start on a GPU takes a second, however many go side by side.
    config.addinivalue_line("markers", "host_only: a GPU's layers have no part in it, so the CPU's run has shown it")


def pytest_collection_modifyitems(config, items):
    if os.environ.get("TRAIN_DEVICE") == "gpu":
        host = [item for item in items if item.get_closest_marker("host_only")]
        config.hook.pytest_deselected(items=host)
        items[:] = [item for item in items if item not in host]
    shard = os.environ.get("SHARD")
    if not shard:
        return
    alone = [item for item in items if item.get_closest_marker("alone")]
    if shard == "alone":
        kept = alone
    else:
        part, parts = map(int, shard.split("/"))
        kept = [item for item in items if item not in alone][part - 1::parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
