"""Writes the sample data of the demos: logs of imaginary lighthouses and talks with their keepers, by a small grammar.

    python tools/make_sample.py            # core/peftx/assets/sample/
    python tools/make_sample.py --check    # exits 1 if the files there differ

The entries have a wording and a layout that no general corpus has, so a short training shows. Held-out entries are of
places and keepers that the training rows do not name.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "core" / "peftx" / "assets" / "sample"

PLACES = (
    "Cape Arden,Stone Point,Grey Island,North Ness,Black Head,Long Skerry,Saint Anne,Old Harbour,Wide Bay"
)
HELD_OUT_PLACES = "Far Point,White Island,South Head"
KEEPERS = (
    "Anna Brown,John Marsh,Mary Hill,Peter Lane,Ruth Cole,Tom Field,Jane West,Paul Reed,Ellen Stone,Mark Wood"
)
HELD_OUT_KEEPERS = "Alice Ford,Henry Cook,Grace Hall"
DAYS = "Monday,Tuesday,Wednesday,Thursday,Friday,Saturday,Sunday"
WINDS = "north,north-east,east,south-east,south,south-west,west,north-west"
SEAS = "calm,smooth,slight,moderate,rough,very rough"
SKIES = "clear,partly cloudy,overcast,low cloud,fog,light rain,heavy rain"
SHIPS = "the ferry to the mainland,a fishing boat,two fishing boats,a sailing ship,a coal ship,the mail boat,a tug"
COURSES = "heading north,heading south,heading for the harbour,heading out to sea,close to the rocks"
WORKS = (
    "cleaned the lens|painted the rail|filled the oil|changed the lamp|mended the door|cleared the drain|"
    "wound the clock|checked the horn|washed the windows|repaired the stairs"
)
NOTES = (
    "Nothing else to report.|The supply boat is expected tomorrow.|A seal rested on the rocks all morning.|"
    "The cat caught a mouse in the store.|The radio was weak after sunset.|Two birds hit the glass in the night.|"
    "The well is low.|A letter came from the office."
)


def entry(rng: random.Random, places: str, keepers: str) -> dict[str, str]:
    """One row: the request, and the log entry."""
    pick = lambda words, mark=",": rng.choice(words.split(mark))  # noqa: E731
    place, keeper, day, wind = pick(places), pick(keepers), pick(DAYS), pick(WINDS)
    knots, lit, out = rng.randrange(2, 48), rng.randrange(4, 9), rng.randrange(5, 8)
    work = rng.sample(WORKS.split("|"), 2)
    lines = [
        f"LOG {place.upper()} / {day.upper()}",
        f"Wind {wind}, {knots} knots. Sea {pick(SEAS)}. Sky {pick(SKIES)}.",
        f"Lamp lit at {lit} in the evening, out at {out} in the morning.",
        f"Seen: {pick(SHIPS)}, {pick(COURSES)}.",
        f"Work done: {work[0]} and {work[1]}.",
        pick(NOTES, "|"),
        f"Signed, {keeper}, keeper.",
    ]
    prompt = f"Write the log of {place} for {day}. Keeper: {keeper}. Wind: {wind}, {knots} knots."
    return {"prompt": prompt, "completion": "\n".join(lines)}


def talk(rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """One row: the office asks a keeper by radio, who answers in short reports."""
    pick = lambda words, mark=",": rng.choice(words.split(mark))  # noqa: E731
    place, keeper, wind, knots = pick(PLACES), pick(KEEPERS), pick(WINDS), rng.randrange(2, 48)
    asked = {
        "How is the weather?": f"Wind {wind}, {knots} knots. Sky {pick(SKIES)}. Over.",
        "What of the sea?": f"Sea {pick(SEAS)} at {place}. Over.",
        "Any ships?": f"I see {pick(SHIPS)}, {pick(COURSES)}. Over.",
        "What have you done today?": f"I {pick(WORKS, '|')}. Over.",
        "Anything else?": f"{pick(NOTES, '|')} Over.",
    }
    messages = [
        {"role": "user", "content": f"Office to {place}. Who is on duty?"},
        {"role": "assistant", "content": f"{place} here. {keeper} on duty. Over."},
    ]
    for question in rng.sample(sorted(asked), 2):
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": asked[question]},
        ]
    return {"messages": messages}


def files() -> dict[str, str]:
    """Name -> content of every sample file; the same at every call."""
    rng = random.Random("peftx sample")
    train = [entry(rng, PLACES, KEEPERS) for _ in range(300)]
    held_out = [entry(rng, HELD_OUT_PLACES, HELD_OUT_KEEPERS) for _ in range(60)]
    calibration = [entry(rng, PLACES, KEEPERS) for _ in range(60)]
    talks = [talk(rng) for _ in range(50)]
    jsonl = {"train.jsonl": train, "held_out.jsonl": held_out, "dialogues.jsonl": talks}
    texts = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in jsonl.items()}
    texts["calibration.txt"] = (
        "\n\n".join(f"{row['prompt']} {row['completion']}" for row in calibration) + "\n"
    )
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    for name, text in files().items():
        path = FOLDER / name
        if check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                print(f"{path} differs: run python tools/make_sample.py", file=sys.stderr)
                return 1
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {len(text.encode()):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
