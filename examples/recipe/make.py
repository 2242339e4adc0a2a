"""
The training data of the default release: `python examples/recipe/make.py --out DIR` -> a folder for `finetune train`.

Two sources, half each language: fictional shops of ten trades (the .toml files here; figures, codes and names drawn anew
for every example, so that nothing can be learned by heart) and the demo store (its FAQs' other wordings, its dialogues,
questions it cannot answer, with what the real retriever finds). Every conversation is rendered by `render_prompt`, as
serving does it. The reply is the sentence of the passage that answers, in the question's language; where none does, a no
in words that the server recognises (bot/phrases.py). The passage that answers stands where the retriever puts it: in two
of three cases best, else somewhere among the others.

The same seed, store and library versions write the same bytes. No question of the case files is in it (--exclude).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import random
import re
import shutil
import string
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from bot.answer import close_to_best  # noqa: E402
from bot.demo import date_promotions  # noqa: E402
from bot.evaluate import squeeze  # noqa: E402
from bot.followup import complete  # noqa: E402
from bot.messages import Language, Message, Turn  # noqa: E402
from bot.phrases import NO_ANSWER_SAID  # noqa: E402
from bot.prompt import PromptStore, render_prompt  # noqa: E402
from bot.skills.promotions import about_promotions, date_text  # noqa: E402
from finetune.data import RENDERED  # noqa: E402
from finetune.grounding import figures_of  # noqa: E402
from retrieval.passages import Kind, Passage  # noqa: E402

LANGUAGES: tuple[Language, Language] = ("zh", "en")
TODAY = datetime(2026, 11, 16, 12, tzinfo=UTC)  # of the dialogues and promotions; a fixed day keeps reruns equal

# How many families of each kind, both languages together; "shop" is of each shop. A family is several questions on the
# same passages, which training computes once (`shared_prefixes`).
COUNTS = {
    "fact": 30, "cross": 8, "policy": 8, "product": 20, "promotion": 36, "follow-up": 12, "not on": 14,
    "shop": 50, "demo": 132, "demo unanswerable": 90,
}  # fmt: skip
# Shops that no training sees: `valid.jsonl` is of them, so that runs can be compared on a store they do not know.
VALID_SHOPS = ("books", "fitness")
# The release was trained on these batches of shops; going on with the third alone did not make it better
# (docs/experiments.md).
BATCHES = ("first", "second")
VALID_SHARE = 0.33  # of the families that a training shop gives
N_DIALOGUES = 20  # replies out of the demo store's dialogues
_HEADINGS = {
    "shipping": ("配送说明", "Delivery"), "abroad": ("境外订单", "Orders abroad"), "returns": ("退换货", "Returns"),
    "warranty": ("质保与维修", "Warranty and repair"), "payment": ("付款", "Payment"), "invoice": ("发票", "Invoices"),
    "corporate": ("企业客户", "Companies"), "member": ("会员与积分", "Membership"), "gift": ("礼品", "Gifts"),
    "contact": ("联系我们", "Contact"), "account": ("账号与隐私", "Account and privacy"), "stock": ("库存", "Stock"),
}  # fmt: skip

_CITIES = [
    ("杭州", "Hangzhou"),
    ("成都", "Chengdu"),
    ("苏州", "Suzhou"),
    ("厦门", "Xiamen"),
    ("西安", "Xi'an"),
    ("长沙", "Changsha"),
]
_STREETS = [
    ("湖滨路", "Hubin Road"),
    ("春熙路", "Chunxi Road"),
    ("观前街", "Guanqian Street"),
    ("中山路", "Zhongshan Road"),
    ("南门里", "Nanmenli"),
]
_NAMES = [
    ("云栖", "Yunqi"),
    ("木槿", "Mujin"),
    ("南风", "Nanfeng"),
    ("小满", "Xiaoman"),
    ("知行", "Zhixing"),
    ("半山", "Banshan"),
    ("拾光", "Shiguang"),
    ("海棠", "Haitang"),
    ("北斗", "Beidou"),
    ("白鹭", "Bailu"),
]
_TRADES = [
    ("户外", "Outdoor"),
    ("乐器", "Music"),
    ("美妆", "Beauty"),
    ("宠物", "Pets"),
    ("玩具", "Toys"),
    ("数码", "Digital"),
    ("书店", "Books"),
    ("茶庄", "Tea"),
    ("鞋履", "Shoes"),
    ("眼镜", "Optics"),
    ("文具", "Stationery"),
    ("母婴", "Baby"),
]
_BEFORE = {
    "zh": ["亲，", "请问", "你好，", "那个…", "老板，", "问下，"],
    "en": ["hi, ", "hello, ", "hey ", "quick question: ", "sorry, ", "excuse me, "],
}
_THEN = {"zh": ["，还有", "；另外", "，顺便问下"], "en": [", and ", "; also ", " and another thing, "]}


@dataclass
class Fact:
    """A sentence of a shop in both languages, and how people ask for it."""

    id: str
    group: str
    title: dict[Language, str]
    text: dict[Language, str]
    asks: dict[Language, list[str]]
    kind: Kind = "faq"


@dataclass
class Example:
    """What `render_prompt` gets, passages best first, and the reply."""

    kind: str
    language: Language
    question: str
    passages: list[Passage]
    reply: str
    store: PromptStore
    history: list[Turn] = field(default_factory=list)


# One wording a language: the server says its own instead, and a choice of one is learned from few examples.
REFUSAL: dict[Language, str] = {
    "zh": "抱歉，资料里没有提到这个。需要我帮您转人工客服吗？",
    "en": "I don't know: the store's information doesn't say. Shall I get you a human agent?",
}


def draw(rng: random.Random, slots: dict[str, str]) -> dict[str, str]:
    """Return values for `slots`: numbers out of their ranges, larger ones as prices end; codes, places and phones by name."""
    city, street = rng.choice(_CITIES), rng.choice(_STREETS)
    values = {
        "city": city[0], "city_en": city[1], "street": street[0], "street_en": street[1],
        "p": f"{rng.randint(200, 899)}-{rng.randint(1000, 9999)}",
    }  # fmt: skip
    for name, kind in slots.items():
        if kind == "code":
            values[name] = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(3, 6))) + str(rng.randint(5, 99))
        elif kind == "off":
            off = rng.choice([5, 8, 10, 12, 15, 20, 25, 30, 35, 40])
            values[name] = str(off)
            values["z"] = f"{(100 - off) / 10:g}".replace(".", "")
        else:
            low, high = map(int, kind.split("-"))
            number = rng.randint(low, high)
            values[name] = str(number if number < 100 else number // 10 * 10 + rng.choice([0, 9]))
    return values


def fill(text: str, values: dict[str, str]) -> str:
    """Fill `{name}`; a name that is not drawn stays, so that a mistake in the files is seen."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), text)


class Recipe:
    """Makes the examples; each of its own seed, so that one more of a kind changes no other."""

    def __init__(self, seed: int, exclude: frozenset[str]) -> None:
        self.seed, self.exclude = seed, exclude
        self.facts = tomllib.loads((HERE / "facts.toml").read_text(encoding="utf-8"))["fact"]
        self.products = tomllib.loads((HERE / "products.toml").read_text(encoding="utf-8"))
        self.promotions = tomllib.loads((HERE / "promotions.toml").read_text(encoding="utf-8"))
        self.unanswerable = tomllib.loads((HERE / "unanswerable.toml").read_text(encoding="utf-8"))
        self.counts: Counter[str] = Counter()

    def random(self, *name: object) -> random.Random:
        return random.Random(":".join(map(str, (self.seed, *name))))

    # --- pieces ---------------------------------------------------------------------------------------

    def store(self, rng: random.Random, promotions: Sequence[str] = ()) -> PromptStore:
        name, trade = rng.choice(_NAMES), rng.choice(_TRADES)
        return PromptStore(
            {"zh": name[0] + trade[0], "en": f"{name[1]} {trade[1]}"}, {"zh": "", "en": ""}, tuple(sorted(promotions))
        )

    def fact(self, rng: random.Random, n: int) -> Fact:
        raw = self.facts[n]
        values = draw(rng, raw.get("slots", {}))
        filled = {lang: [fill(x, values) for x in raw[lang]] for lang in LANGUAGES}
        return Fact(
            f"faq-{raw['group']}-{n}", raw["group"], {lang: x[0] for lang, x in filled.items()},
            {lang: x[1] for lang, x in filled.items()}, {lang: x[2:] for lang, x in filled.items()},
        )  # fmt: skip

    def others(self, rng: random.Random, n: int, k: int, near: int) -> list[Fact]:
        """Return k other facts than the n-th, `near` of them of its group."""
        group = self.facts[n]["group"]
        same = [i for i, f in enumerate(self.facts) if f["group"] == group and i != n]
        rest = [i for i, f in enumerate(self.facts) if f["group"] != group]
        chosen = rng.sample(same, min(near, k, len(same)))
        chosen += rng.sample(rest, k - len(chosen))
        return [self.fact(rng, i) for i in chosen]

    def passage(self, fact: Fact, language: Language) -> Passage:
        return Passage(
            f"{fact.id}-{language}", fact.kind, fact.title[language], fact.text[language], language, "recipe"
        )

    def place(self, rng: random.Random, right: Passage, others: list[Passage]) -> list[Passage]:
        """Return passages best first, the right one where the retriever would have it: mostly best, not always."""
        others = list(others)
        rng.shuffle(others)
        at = 0 if rng.random() < 0.8 else rng.randint(0, len(others))
        return [*others[:at], right, *others[at:]]

    def noisy(self, rng: random.Random, question: str, language: Language) -> str:
        """Return the question as hurried people type it."""
        dice = rng.random()
        if dice < 0.15:
            question = rng.choice(_BEFORE[language]) + question
        elif dice < 0.3:
            question += {"zh": rng.choice(["？", "呀", "？？", "~"]), "en": rng.choice(["?", "??", " pls", " thanks"])}[
                language
            ]
        elif dice < 0.38 and language == "en" and len(question) > 12:
            n = rng.randint(2, len(question) - 3)
            question = question[:n] + question[n + 1] + question[n] + question[n + 2 :]
        elif dice < 0.5 and language == "en":
            question = question[:1].upper() + question[1:] + "?"
        return question

    def n_others(self, rng: random.Random) -> int:
        return rng.choices([1, 2, 3], [2, 3, 4])[0]

    # --- fictional shops ------------------------------------------------------------------------------

    def unanswered(self, rng: random.Random, language: Language, present: set[str]) -> str:
        """Return a question that none of the facts with the ids `present` answers."""
        if rng.random() < 0.6:
            return self.noisy(rng, rng.choice(self.unanswerable[language]), language)
        groups = {i.split("-", 1)[1].rpartition("-")[0] for i in present}
        absent = [f for f in self.facts if f["group"] not in groups]
        return self.noisy(rng, rng.choice(rng.choice(absent)[language][2:]), language)

    def earlier(self, rng: random.Random, language: Language, chance: float = 0.15) -> list[Turn]:
        """Return what was said before, now and then, which has nothing to do with the question."""
        if rng.random() >= chance:
            return []
        before = self.fact(rng, rng.randrange(len(self.facts)))
        return [Turn(rng.choice(before.asks[language]), before.text[language])]

    def make_fact(self, rng: random.Random, language: Language, cross: bool = False) -> list[Example]:
        n = rng.randrange(len(self.facts))
        fact = self.fact(rng, n)
        others = self.others(rng, n, self.n_others(rng), rng.choices([0, 1, 2, 3], [1, 3, 3, 2])[0])
        there: Language = ("en" if language == "zh" else "zh") if cross else language
        passages = self.place(
            rng,
            self.passage(fact, there),
            [self.passage(f, there if cross and rng.random() < 0.5 else language) for f in others],
        )
        asked = [(q, fact.text[language]) for q in rng.sample(fact.asks[language], min(3, len(fact.asks[language])))]
        other = rng.choice(others)
        if rng.random() < 0.5:
            asked.append((rng.choice(other.asks[language]), other.text[language]))
        asked = [(self.noisy(rng, q, language), a) for q, a in asked]
        if not cross and rng.random() < 0.2:
            both = (
                rng.choice(fact.asks[language]).rstrip("？?")
                + rng.choice(_THEN[language])
                + rng.choice(other.asks[language])
            )
            asked.append((both, ("" if language == "zh" else " ").join((fact.text[language], other.text[language]))))
        present = {f.id for f in (fact, *others)}
        asked += [(self.unanswered(rng, language, present), REFUSAL[language]) for _ in range(2)]
        return self.family(rng, language, passages, asked, self.earlier(rng, language))

    def family(
        self,
        rng: random.Random,
        language: Language,
        passages: list[Passage],
        asked: list[tuple[str, str]],
        history: list[Turn] | None = None,
        store: PromptStore | None = None,
    ) -> list[Example]:
        store = store or self.store(rng)
        return [Example("", language, q, passages, a, store, history or []) for q, a in dict(asked).items()]

    def make_cross(self, rng: random.Random, language: Language) -> list[Example]:
        return self.make_fact(rng, language, cross=True)

    def make_policy(self, rng: random.Random, language: Language) -> list[Example]:
        n = rng.choice([i for i, f in enumerate(self.facts) if f["group"] in _HEADINGS])
        fact = self.fact(rng, n)
        inside = [fact, *self.others(rng, n, rng.randint(1, 2), 2)]
        inside = [f for f in inside if f.group == fact.group]
        rng.shuffle(inside)
        book = rng.choice([("购物须知", "Customer guide"), ("服务说明", "Our service"), ("常见规则", "Terms")])
        heading = " > ".join((book[language == "en"], _HEADINGS[fact.group][language == "en"]))
        listed = [f"- {f.text[language]}" for f in inside]
        text = (
            "\n".join(listed)
            if rng.random() < 0.4
            else ("" if language == "zh" else " ").join(f.text[language] for f in inside)
        )
        right = Passage(f"{fact.id}-policy", "policy", heading, text, language, "recipe")
        rest = [f for f in self.others(rng, n, self.n_others(rng) + 2, 1) if f.id not in {i.id for i in inside}]
        others = rest[: self.n_others(rng)]
        asked = [
            (self.noisy(rng, rng.choice(f.asks[language]), language), f.text[language])
            for f in (*inside, *inside, others[0])
        ]
        asked.append((self.unanswered(rng, language, {f.id for f in (*inside, *others)}), REFUSAL[language]))
        passages = self.place(rng, right, [self.passage(f, language) for f in others])
        return self.family(rng, language, passages, asked, self.earlier(rng, language))

    def good(self, rng: random.Random, n: int, language: Language, must: str = "") -> tuple[Passage, dict[str, str]]:
        """Return a good's passage, as retrieval/load.py writes it, and its sentences by attribute."""
        _, zh, _, en, _, *attributes = self.products["goods"][n]
        title = zh if language == "zh" else en
        own = [a for a in attributes if a not in ("price", "stock")]
        kept = set(rng.sample(own, min(len(own), rng.randint(2, 4)))) | ({must} & set(own))
        said: dict[str, str] = {}
        for a in ("price", *[a for a in own if a in kept]):
            raw = self.products["attributes"][a]
            said[a] = fill(raw[language][0], draw(rng, raw.get("slots", {})))
        if rng.random() < 0.3:
            said["stock"] = {"zh": "目前已售罄，暂时缺货。", "en": "Sold out at the moment."}[language]
        else:
            count = rng.randint(3, 90)
            said["stock"] = {"zh": f"现货库存 {count} 件。", "en": f"In stock: {count}."}[language]
        gap, stop = ("", "。") if language == "zh" else (" ", ".")
        return Passage(
            f"P{1000 + n}-{language}",
            "product",
            title,
            f"{title}{stop}{gap}" + gap.join(said.values()),
            language,
            "recipe",
        ), said

    def ask_good(self, rng: random.Random, n: int, attribute: str, language: Language) -> str:
        short = self.products["goods"][n][2 if language == "zh" else 4]
        if attribute == "stock":
            raw = {
                "zh": ["{n}还有吗", "{n}现在买得到不", "{n}是不是卖光了", "{n}断货没"],
                "en": ["is the {n} still around", "can i get the {n} now", "did the {n} sell out", "any {n} left"],
            }[language]
        else:
            raw = self.products["attributes"][attribute][language][1:]
        return rng.choice(raw).replace("{n}", short)

    def said_of(self, n: int, attribute: str, said: dict[str, str], language: Language) -> str:
        title = self.products["goods"][n][1 if language == "zh" else 3]
        stop, gap = ("。", "") if language == "zh" else (".", " ")
        return f"{title}{stop}{gap}{gap.join(said.values())}"

    def make_product(self, rng: random.Random, language: Language) -> list[Example]:
        goods = self.products["goods"]
        n, m, absent = rng.sample(range(len(goods)), 3)
        (right, said), (other, other_said) = self.good(rng, n, language), self.good(rng, m, language)
        facts = [self.fact(rng, i) for i in rng.sample(range(len(self.facts)), rng.randint(1, 2))]
        asked = [
            (self.ask_good(rng, n, a, language), self.said_of(n, a, said, language))
            for a in rng.sample(sorted(said), 3)
        ]
        a = rng.choice(sorted(other_said))
        asked.append((self.ask_good(rng, m, a, language), self.said_of(m, a, other_said, language)))
        # What the good's passage does not say, and a good that is not there.
        lacking = sorted(set(goods[n][5:]) - set(said))
        if lacking and rng.random() < 0.7:
            asked.append((self.ask_good(rng, n, rng.choice(lacking), language), REFUSAL[language]))
        else:
            asked.append((self.ask_good(rng, absent, rng.choice(goods[absent][5:]), language), REFUSAL[language]))
        asked = [(self.noisy(rng, q, language), reply) for q, reply in asked]
        passages = self.place(rng, right, [other, *(self.passage(f, language) for f in facts)])
        return self.family(rng, language, passages, asked, self.earlier(rng, language))

    def make_follow_up(self, rng: random.Random, language: Language) -> list[Example]:
        """The same of another good: "and the tent?"."""
        attribute = rng.choice(
            [a for a in self.products["attributes"] if sum(a in g[5:] for g in self.products["goods"]) > 1]
        )
        first, second = rng.sample([i for i, g in enumerate(self.products["goods"]) if attribute in g[5:]], 2)
        one, said_one = self.good(rng, first, language, must=attribute)
        two, said_two = self.good(rng, second, language, must=attribute)
        short = self.products["goods"][second][2 if language == "zh" else 4]
        follow = {
            "zh": ["那{n}呢", "{n}呢？", "换成{n}的话呢"],
            "en": ["and the {n}?", "what about the {n}", "how about the {n} then?"],
        }[language]
        history = [
            Turn(self.ask_good(rng, first, attribute, language), self.said_of(first, attribute, said_one, language))
        ]
        others = [one, self.passage(self.fact(rng, rng.randrange(len(self.facts))), language)]
        asked = [(rng.choice(follow).replace("{n}", short), self.said_of(second, attribute, said_two, language))]
        return self.family(rng, language, self.place(rng, two, others), asked, history)

    def promotion(self, rng: random.Random, n: int, language: Language) -> tuple[Passage, str, list[str]]:
        """Return a promotion's passage, as retrieval/load.py writes it, what a reply quotes of it, and questions."""
        raw = self.promotions["promotion"][n]
        words = self.promotions["words"]
        values = draw(rng, raw.get("slots", {}))
        season, goods, gift = rng.choice(words["seasons"]), rng.choice(words["goods"]), rng.choice(words["gifts"])
        values |= {"season": season[0], "season_en": season[1], "c": goods[0], "c_en": goods[1]}
        values |= {"g": gift[0], "g_en": gift[1], "f": gift[2], "f_en": gift[3]}
        if "b" in values:
            values["b2"] = str(int(values["b"]) + rng.randint(3, 60))
        title, text, *asks = (fill(x, values) for x in raw[language])
        title = title[:1].upper() + title[1:]
        begin = TODAY - timedelta(days=rng.randint(0, 9))
        end = TODAY + timedelta(days=rng.randint(1, 20))
        dates = {
            "zh": f"活动时间：{date_text(begin, 'zh')}至{date_text(end, 'zh')}（含）。",
            "en": f" Runs from {date_text(begin, 'en')} to {date_text(end, 'en')} (inclusive).",
        }[language]
        return Passage(f"promo-{n}-{language}", "promotion", title, text + dates, language, "recipe"), text, asks

    def make_promotion(self, rng: random.Random, language: Language) -> list[Example]:
        numbers = rng.sample(range(len(self.promotions["promotion"])), rng.randint(2, 5))
        made = [self.promotion(rng, n, language) for n in numbers]
        passages = [p for p, _, _ in made]
        others = [
            self.passage(self.fact(rng, rng.randrange(len(self.facts))), language) for _ in range(rng.choice([0, 0, 1]))
        ]
        asked = []
        for right, _, asks in made[:3]:
            asked.append((rng.choice(asks), right.text))
        head, tail, mark = {"zh": ("目前有：", "。", "；"), "en": ("On now: ", ".", "; ")}[language]
        listed = mark.join(p.title for p in reversed(passages))  # in the order in which they are read
        asked += [(q, head + listed + tail) for q in rng.sample(self.promotions["all"][language], 2)]
        asked.append((self.unanswered(rng, language, set()), REFUSAL[language]))
        asked = [(self.noisy(rng, q, language), reply) for q, reply in asked]
        return self.family(
            rng, language, [*passages, *others], asked, store=self.store(rng, [p.title for p in passages])
        )

    def make_not_on(self, rng: random.Random, language: Language) -> list[Example]:
        numbers = rng.sample(range(len(self.promotions["promotion"])), rng.randint(2, 4))
        made = [self.promotion(rng, n, language)[0] for n in numbers]
        gone, on = made[0], made[1:]
        if rng.random() < 0.5:
            day = date_text(TODAY - timedelta(days=rng.randint(1, 40)), language)
            notice = {"zh": f"“{gone.title}”已于{day}结束。", "en": f"“{gone.title}” ended on {day}."}[language]
        else:
            day = date_text(TODAY + timedelta(days=rng.randint(2, 40)), language)
            notice = {
                "zh": f"“{gone.title}”还没有开始，将于{day}开始。",
                "en": f"“{gone.title}” has not started yet; it begins on {day}.",
            }[language]
        spoken = gone.title if language == "en" else gone.title.partition("：")[2] or gone.title
        asked = [
            (self.noisy(rng, q.replace("{t}", spoken), language), notice)
            for q in rng.sample(self.promotions["gone"][language], 2)
        ]
        return self.family(
            rng, language, [replace(gone, text=notice), *on], asked, store=self.store(rng, [p.title for p in on])
        )

    # --- shops written by hand: examples/training -----------------------------------------------------

    def shops(self, folder: Path, share: float, *, valid: bool = False) -> Iterator[list[Example]]:
        """
        Yield families from each shop in `folder`: its questions, and the passages that the retriever finds for them.

        `valid` takes the shops that no training sees, else those are left out.
        """
        found = sorted(p for p in folder.iterdir() if (p / "knowledge.jsonl").exists()) if folder.is_dir() else []
        batches = tomllib.loads((folder / "batches.toml").read_text(encoding="utf-8")) if found else {}
        known = {name for batch in BATCHES for name in batches[batch]} if found else set()
        found = [p for p in found if p.name in known and (p.name in VALID_SHOPS) == valid]
        for shop in found:
            passages = {
                p["id"]: p for p in map(json.loads, (shop / "knowledge.jsonl").read_text(encoding="utf-8").splitlines())
            }
            asks = [json.loads(q) for q in (shop / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
            with self.searching(shop, passages.values()) as find:
                for n in range(round(share * COUNTS["shop"])):
                    rng = self.random("shop", shop.name, n)
                    language = LANGUAGES[n % 2]
                    own = [a for a in asks if a["lang"] == language]
                    # A quarter begins with what the shop does not say, and with what the search finds for that.
                    anchors = [a for a in own if a["relevant"]] if n // 2 % 4 else [a for a in own if not a["relevant"]]
                    family = self.shop_family(rng, anchors[(n // 2 * 7 + n) % len(anchors)], own, find, language)
                    if rng.random() < 0.08:  # the shop wrote it in the other language only
                        other = LANGUAGES[language == "zh"]
                        twins = (
                            [passages[f"{p.id.removesuffix(language)}{other}"] for p in family[0].passages]
                            if family
                            else []
                        )
                        there = [Passage(t["id"], "faq", t["title"], t["text"], other, "recipe") for t in twins]
                        family = [replace(e, passages=there) for e in family]
                    yield [replace(e, kind="shop") for e in family]

    def shop_family(
        self,
        rng: random.Random,
        anchor: dict[str, Any],
        own: list[dict[str, Any]],
        find: Callable[..., list[Passage]],
        language: Language,
    ) -> list[Example]:
        passages = find(anchor["text"], language, 4)
        there = {p.id.rpartition("-")[0]: p for p in passages}

        def answered(ask: dict[str, Any]) -> bool:
            return bool(ask["relevant"]) and all(r in there for r in ask["relevant"])

        def reply(ask: dict[str, Any]) -> str:
            return ("" if language == "zh" else " ").join(there[r].text for r in ask["relevant"])

        if anchor["relevant"] and not answered(anchor):
            return []  # what the search missed may be half answered by what it found
        others = [a for a in own if a is not anchor and answered(a)]
        rng.shuffle(others)
        # Mostly of the same passage, so that its place keeps its meaning.
        same = [a for a in others if a["relevant"] == anchor["relevant"]][:3]
        chosen = same + [a for a in others if a not in same][: rng.choice([0, 1, 1])]
        asked = [
            (self.noisy(rng, a["text"], language), reply(a)) for a in ([anchor] if answered(anchor) else []) + chosen
        ]
        nothing = [a for a in own if not a["relevant"] and a is not anchor]
        # First those whose answer one would look for in these passages: to refuse what is far off is easily learned.
        near = [a for a in nothing if set(a.get("near", ())) & set(there)]
        rng.shuffle(near)
        refused = ([anchor] if not anchor["relevant"] else []) + near[: rng.choice([1, 2])]
        refused += rng.sample([a for a in nothing if a not in refused], 0 if len(refused) > 1 else 1)
        asked += [(self.noisy(rng, a["text"], language), REFUSAL[language]) for a in refused]
        return self.family(rng, language, passages, asked, self.earlier(rng, language, 0.1))

    @contextmanager
    def searching(self, shop: Path, passages: Iterable[dict[str, Any]]) -> Iterator[Callable[..., list[Passage]]]:
        """Make a store of `passages` and yield its search, the server's own."""
        from bot.settings import default_cache_dir
        from retrieval.bilingual import default_embedder
        from retrieval.retriever import LiveRetriever

        with tempfile.TemporaryDirectory(prefix=f"{shop.name}-") as work:
            folder = Path(work)
            shutil.copy(HERE.parent / "second" / "store.toml", folder / "store.toml")
            with (folder / "faqs.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "question", "answer", "lang", "questions"])
                writer.writerows(
                    [p["id"], p["title"], p["text"], p["lang"], "|".join(p["questions"])] for p in passages
                )
            retriever = LiveRetriever(folder, default_embedder(2), default_cache_dir() / "index")
            try:
                yield lambda question, language, k: [
                    h.passage for h in close_to_best(retriever.search(question, k, now=TODAY, lang=language))
                ]
            finally:
                retriever.close()

    # --- the demo store -------------------------------------------------------------------------------

    def demo(self, folder: Path, share: float) -> Iterator[list[Example]]:
        """Yield examples from the demo store; its search is the server's own, with its mistakes."""
        from bot.settings import default_cache_dir, load_store_profile
        from retrieval.bilingual import default_embedder
        from retrieval.retriever import LiveRetriever

        work = Path(tempfile.mkdtemp(prefix="demo-"))
        folder = Path(shutil.copytree(folder, work / "demo"))  # its promotions are dated anew
        date_promotions(folder, TODAY.date())
        profile = load_store_profile(folder)
        retriever = LiveRetriever(folder, default_embedder(2), default_cache_dir() / "index")
        titles = tuple(sorted({p.title for p in retriever.current("promotion", now=TODAY)}))
        store = PromptStore(profile.names, profile.persona, titles)

        # Without its first words in most: they are the same in each, and training time is better spent on passages.
        short = PromptStore(profile.names, {"zh": "", "en": ""})

        def find(
            question: str, language: Language, k: int, history: Sequence[Turn] = (), at: datetime = TODAY
        ) -> list[Passage]:
            query = complete(question, tuple(history)).standalone
            return [hit.passage for hit in close_to_best(retriever.search(query, k, now=at, lang=language))]

        def find_all(question: str, language: Language, k: int) -> list[Passage]:
            return [hit.passage for hit in retriever.search(question, k, now=TODAY, lang=language)]

        try:
            with (folder / "faqs.csv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            wordings = {
                lang: [(q, r) for r in rows if r["lang"] == lang for q in r["questions"].split("|")]
                for lang in LANGUAGES
            }
            for kind in ("demo", "demo unanswerable"):
                for n in range(round(share * COUNTS[kind])):
                    rng, language = self.random(kind, n), LANGUAGES[n % 2]
                    none = self.unanswerable[language][(n // 2 * 7 + 3) % len(self.unanswerable[language])]
                    question, row = rng.choice(wordings[language])
                    refused = (none, REFUSAL[language])
                    if kind == "demo":
                        passages = find_all(question, language, rng.choices([1, 2, 3, 4], [5, 4, 3, 5])[0])
                        right = next((p for p in passages if p.id == row["id"]), None)
                        if right is None:
                            continue
                        # The wordings are in the index, so the right one is found best: put where a new wording finds it.
                        passages = self.place(rng, right, [p for p in passages if p is not right])
                    else:
                        passages = find(none, language, 4)
                    ids = {p.id for p in passages}
                    here = [(q, r["answer"].strip()) for q, r in wordings[language] if r["id"] in ids]
                    own = [(q, r["answer"].strip()) for q, r in wordings[language] if r is row and r["id"] in ids]
                    topics = {r["tags"].split(",")[0] for _, r in wordings[language] if r["id"] in ids}
                    elsewhere = [q for q, r in wordings[language] if r["tags"].split(",")[0] not in topics]
                    asked = rng.sample(own, min(4, len(own))) + rng.sample(here, min(1 + 2 * (not own), len(here)))
                    asked += [refused, (rng.choice(elsewhere), REFUSAL[language])]
                    if kind == "demo unanswerable":
                        asked.append((rng.choice(self.unanswerable[language]), REFUSAL[language]))
                    asked = [(self.noisy(rng, q, language), a) for q, a in asked]
                    family = self.family(rng, language, passages, asked, store=short if rng.random() < 0.9 else store)
                    yield [replace(e, kind=kind) for e in (renumbered(rng, family) if rng.random() < 0.6 else family)]
            yield from self.demo_dialogues(folder / "dialogues", find, store, share)
        finally:
            retriever.close()
            shutil.rmtree(work)

    def demo_dialogues(
        self, folder: Path, find: Callable[..., list[Passage]], store: PromptStore, share: float
    ) -> Iterator[list[Example]]:
        """Yield the human replies that say what a passage says: figures and all, and not much else."""
        made: list[Example] = []
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                raw = json.loads(line)
                language: Language = "en" if raw["lang"] == "en" else "zh"
                texts = [m["content"] for m in raw["messages"]]
                history: list[Turn] = []
                for question, reply in zip(texts[::2], texts[1::2], strict=False):
                    known = figures_of("\n".join([question, *(f"{t.question}\n{t.reply}" for t in history)]))
                    figures = figures_of(reply)
                    if 8 <= len(reply) <= 160 and figures and not figures <= known and not about_promotions(question):
                        passages = find(question, language, 4, history)
                        stated = set().union(*(figures_of(f"{p.title}\n{p.text}") for p in passages))
                        best = max(len(figures & figures_of(f"{p.title}\n{p.text}")) for p in passages)
                        # All new figures in one passage: two passages' figures are never mixed, nothing is reckoned.
                        if figures - known <= stated and best >= len(figures - known):
                            made.append(
                                Example("demo dialogue", language, question, passages, reply, store, history[-2:])
                            )
                    history.append(Turn(question, reply))
        rng = self.random("demo dialogues")
        rng.shuffle(made)
        for language in LANGUAGES:
            yield from [[e] for e in made if e.language == language][: round(share * N_DIALOGUES / 2)]

    # --- all ------------------------------------------------------------------------------------------

    def fictional(self, share: float = 1.0, name: str = "train") -> Iterator[list[Example]]:
        for kind, count in COUNTS.items():
            make = getattr(self, f"make_{kind.replace(' ', '_').replace('-', '_')}", None)
            for n in range(round(count * share) if make else 0):
                rng = self.random(name, kind, n)
                yield [replace(e, kind=kind) for e in make(rng, LANGUAGES[n % 2])]

    def write(self, families: Iterator[list[Example]], path: Path) -> None:
        seen: set[str] = set()
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for e in itertools.chain.from_iterable(families):
                if squeeze(e.question) in self.exclude:
                    self.counts["left out: a question of the cases"] += 1
                    continue
                messages = [
                    *render_prompt(e.store, e.history, e.question, e.passages, e.language),
                    Message("assistant", e.reply),
                ]
                learn = [False] * (len(messages) - 1) + [True]
                line = json.dumps(
                    {"kind": e.kind, "learn": learn, "messages": [[m.role, m.content] for m in messages]},
                    ensure_ascii=False,
                )
                if line not in seen:
                    seen.add(line)
                    answered = "refusal" if e.reply == REFUSAL[e.language] else "answer"
                    self.counts[f"{path.stem}: {e.kind}, {answered}, {e.language}"] += 1
                    file.write(line + "\n")


_COUNTED = re.compile(
    r"(?<![\d.,:A-Za-z-])(¥?)(\d{1,4})(?=\s?(?:天|小时|个?工作日|%|件|期|分钟|年|元|days?|hours?|working|years?|pieces|minutes|\b)(?![\d:]))|(?<=¥)(\d{1,4})(?![\d,])"
)


def renumbered(rng: random.Random, family: list[Example]) -> list[Example]:
    """Return the family with its figures changed, everywhere alike, so that copying is learned and not the store."""
    texts = [f"{p.title} {p.text}" for p in family[0].passages] if family else []
    if any(re.search(r"\d", e.question) for e in family) or any(_DATED.search(t) for t in texts):
        return family
    mapping: dict[str, str] = {}

    def change(m: re.Match[str]) -> str:
        number = m[2] or m[3]
        if number not in mapping:
            n = int(number)
            for _ in range(20):
                new = str(max(2, round(n * rng.uniform(0.5, 1.9)))) if n > 3 else str(rng.randint(2, 9))
                if new not in mapping.values():
                    break
            mapping[number] = new
        return (m[1] or "") + mapping[number]

    passages = [
        replace(p, title=_COUNTED.sub(change, p.title), text=_COUNTED.sub(change, p.text)) for p in family[0].passages
    ]
    return [replace(e, passages=passages, reply=_COUNTED.sub(change, e.reply)) for e in family]


_DATED = re.compile(
    r"月|\d (?:January|February|March|April|May|June|July|August|September|October|November|December)|\d:\d|折"
)


def questions_of(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            yield from json.loads(line)["turns"]


def make(
    out: Path, *, demo: Path | None, shops: Path | None, exclude: Sequence[Path], seed: int, share: float = 1.0
) -> dict[str, Any]:
    """Write the data folder `out`, which must not exist, and return its manifest."""
    recipe = Recipe(seed, frozenset(squeeze(q) for path in exclude for q in questions_of(path)))
    assert all(NO_ANSWER_SAID.search(t) for t in REFUSAL.values()), "a refusal that the server would not recognise"
    out.mkdir(parents=True)

    def train() -> Iterator[list[Example]]:
        yield from recipe.fictional(share)
        if shops is not None:
            yield from recipe.shops(shops, share)
        if demo is not None:
            yield from recipe.demo(demo, share)

    recipe.write(train(), out / "train.jsonl")
    unseen = recipe.shops(shops, share * VALID_SHARE, valid=True) if shops is not None else iter(())
    recipe.write(itertools.chain(recipe.fictional(0.08, "valid"), unseen), out / "valid.jsonl")
    recipe.write(iter(()), out / "test.jsonl")
    files = {p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in sorted(out.glob("*.jsonl"))}
    manifest = {
        "format": RENDERED,
        "masked": True,
        "data_sha256": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        "files": files,
        "counts": dict(sorted(recipe.counts.items())),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the training data of the default release.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the data folder; must not exist")
    parser.add_argument("--demo", type=Path, default=HERE.parent / "demo", metavar="DIR", help="the demo store")
    parser.add_argument(
        "--shops", type=Path, default=HERE.parent / "training", metavar="DIR", help="shops written by hand"
    )
    parser.add_argument("--fictional", action="store_true", help="only the fictional shops; needs no embedder")
    parser.add_argument("--share", type=float, default=1.0, metavar="S", help="of the examples (1)")
    parser.add_argument(
        "--exclude",
        type=Path,
        action="append",
        default=[],
        metavar="C.jsonl",
        help="case files whose questions are left out",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    exclude = options.exclude or sorted(p for p in HERE.parent.rglob("*cases.jsonl"))
    demo, shops = (None, None) if options.fictional else (options.demo, options.shops)
    manifest = make(options.out, demo=demo, shops=shops, exclude=exclude, seed=options.seed, share=options.share)
    print(json.dumps(manifest["counts"], ensure_ascii=False, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
