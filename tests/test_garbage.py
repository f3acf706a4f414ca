import subprocess
import sys


def test_what_a_process_began_with_is_looked_through_no_more() -> None:
    code = """
import gc
from lorauter.garbage import settle
here = len(gc.get_objects())
settle()
looked = []
gc.callbacks.append(lambda phase, info: looked.append(info["generation"]) if phase == "start" else None)
cycles = [[] for _ in range(5000)]
for one in cycles:
    one.append(one)
print(gc.get_freeze_count() > here / 2, len(gc.get_objects()) < here, looked)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", "True", "[]"]
