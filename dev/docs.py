"""Writes the option table of `train_llama --options_table` between the markers of README.md.

    python3 dev/docs.py            writes
    python3 dev/docs.py --check    exits with 1 when the table is not current
"""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- options: written by `make docs` -->", "<!-- end of options -->"


def main():
    table = subprocess.run([ROOT / "train_llama", "--options_table"], capture_output=True, text=True, check=True).stdout
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    new = f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"
    if new == text:
        print("README.md: the option table is current")
        return 0
    if "--check" in sys.argv:
        print("README.md: the option table is not current; run make docs")
        return 1
    readme.write_text(new)
    print("README.md: option table written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
