"""SHARD=2/3 runs the second third of the tests, every third one; those that must have the GPU for themselves, marked
`alone`, run under SHARD=alone only. Without SHARD all run."""
import os


def pytest_configure(config):
    config.addinivalue_line("markers", "alone: measures what the whole GPU has, so nothing else may run on it")


def pytest_collection_modifyitems(config, items):
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
