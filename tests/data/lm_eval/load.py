"""The data of the tasks beside this file, without a hub."""

import json
from pathlib import Path

import datasets


def boats(**_):
    lines = Path(__file__).with_name("boats.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
