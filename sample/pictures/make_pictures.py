"""Take README's pictures from the report of the demo: `make demo`, then

    python sample/pictures/make_pictures.py

Writes loss_curve.png and voice.png beside this file.
"""

import base64
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "demo" / "model" / "voice_report.html"
NAMES = ("voice.png", "loss_curve.png")  # in the order in which they stand on the page


def main() -> int:
    if not PAGE.is_file():
        sys.exit(f"There is no {PAGE}: run `make demo` first.")
    # The page is our own, written by test_model.py: a pattern is enough for it.
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', PAGE.read_text(encoding="utf-8"))
    for name, picture in zip(NAMES, pictures, strict=True):
        (HERE / name).write_bytes(base64.b64decode(picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
