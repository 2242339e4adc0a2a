"""
The names merchants give their columns -> the store's fields. One table, in Chinese and English; no files, no rows.

To teach the importer another name, add it to `NAMES`. A name is compared without case, width, spaces, signs and what
stands in brackets: `* 问题（必填）` is 问题, `Sale Price (CNY)` is sale price.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from retrieval.words import fold, squash

SheetKind = Literal["faqs", "products", "promotions"]

# Per kind and field: names from the surest on. Where two columns of a sheet fit one field, the surer one is it. After
# "?" stand names that say little by themselves: they are taken only where no other column fits.
NAMES: dict[SheetKind, dict[str, str]] = {
    "faqs": {
        "question": """标准问题 标准问 标准问法 标准提问 知识标题 问题标题 问题 提问 问句 问法 用户问题 用户问 客户问题
            客户提问 用户提问 常见问题 咨询问题 买家问题 顾客问题 问 question standard-question canonical-question
            main-question faq-question faq query q prompt customer-question user-question inquiry enquiry instruction
            ? 标题 主题 title subject topic""",
        "answer": """标准答案 标准回复 标准回答 答案 回答 回复 答复 解答 应答 回复内容 答案内容 回答内容 回复话术 客服回复
            客服回答 参考答案 推荐回复 话术 知识内容 答 answer standard-answer canonical-answer faq-answer response reply
            a bot-response agent-response resolution solution completion output ? 内容 正文 content text body
            description""",
        "questions": """相似问 相似问法 相似问题 相似提问 扩展问 扩展问法 扩展问题 其他问法 其它问法 其他问题 更多问法
            同义问 同义问法 同义问题 近似问法 近似问 问法变体 别名 关联问法 用户问法 questions similar-questions
            similar-question similar other-questions other-wordings alternative-questions alternate-questions
            alternative-question alternatives variations question-variations variants paraphrases paraphrase utterances
            aliases training-phrases synonyms rephrasings""",
        "id": "id 编号 知识id 知识编号 问题id 问题编号 条目id 条目编号 faqid faq编号 key uuid",
        "number": "序号 行号 组号 分组id 问题组 no number num index group group-id row #",
        "lang": "语言 语种 lang language locale",
        "tags": "标签 关键词 分类 类别 类目 一级分类 二级分类 三级分类 目录 分组 知识分类 问题分类 tags tag category categories "
        "label labels intent section",
        "valid_from": "生效时间 生效日期 开始时间 开始日期 起始时间 起始日期 有效期起 有效开始时间 valid-from start-date "
        "effective-from effective-date starts-at start start-time",
        "valid_until": "失效时间 失效日期 结束时间 结束日期 截止时间 截止日期 到期时间 到期日期 过期时间 有效期至 有效期止 "
        "有效结束时间 valid-until valid-to end-date effective-to expires expiry expiry-date expires-at ends-at end "
        "end-time",
        "repeats": "重复 周期 重复规则 循环 repeats repeat recurrence",
    },
    "products": {
        "id": "id 商品id 商品编号 商品编码 产品编号 产品编码 产品id 编号 编码 product-id item-id spu product-code item-code "
        "handle",
        "sku": "sku 货号 sku编码 sku编号 款号 article-number item-number sku-code goods-sn",
        "title": "商品名称 商品标题 商品名 产品名称 产品标题 产品名 宝贝名称 宝贝标题 品名 名称 商品 产品 product-name "
        "product-title item-name title name product item ? 标题",
        "price": "售价 销售价 现价 价格 商品价格 单价 零售价 sale-price price unit-price retail-price current-price",
        "description": "商品描述 产品描述 描述 商品简介 简介 商品详情 详情 卖点 商品卖点 说明 介绍 description "
        "product-description desc brief details body summary body-html",
        "currency": "币种 货币 currency currency-code",
        "url": "商品链接 产品链接 链接 网址 详情链接 url link product-url product-link",
        "image": "主图 商品主图 图片 商品图片 图片链接 主图链接 image image-url image-link image-src picture photo",
        "category": "分类 商品分类 类目 商品类目 品类 类别 category product-category product-type type",
        "stock": "库存 库存数量 商品库存 可售库存 数量 stock inventory quantity qty stock-quantity inventory-quantity",
        "lang": "语言 语种 lang language locale",
    },
    "promotions": {
        "id": "id 活动id 活动编号 优惠id 优惠编号 编号 promotion-id campaign-id",
        "title": "活动名称 活动标题 活动名 优惠名称 优惠活动 优惠标题 促销名称 促销活动 活动主题 活动 promotion "
        "promotion-name campaign campaign-name offer offer-name deal title name ? 名称 标题 主题",
        "description": "活动内容 活动描述 活动说明 活动详情 优惠内容 优惠说明 优惠力度 促销内容 内容 描述 说明 "
        "description details desc offer-details content text",
        "code": "优惠码 优惠券码 优惠券代码 折扣码 券码 兑换码 促销码 口令 code coupon coupon-code promo-code "
        "discount-code voucher voucher-code",
        "starts_at": "开始时间 开始日期 活动开始时间 活动开始 起始时间 起始日期 生效时间 生效日期 上线时间 starts-at "
        "start start-date start-time start-at valid-from from begins",
        "ends_at": "结束时间 结束日期 活动结束时间 活动结束 截止时间 截止日期 失效时间 失效日期 到期时间 下线时间 ends-at "
        "end end-date end-time end-at valid-until valid-to until expires expiry-date to",
        "repeats": "重复 周期 重复规则 循环 repeats repeat recurrence",
        "products": "适用商品 适用范围 适用分类 适用类目 商品范围 参与商品 活动商品 活动范围 products applies-to categories "
        "product-categories",
        "conditions": "使用条件 条件 使用规则 活动规则 规则 限制 使用限制 备注条件 参与条件 conditions condition terms "
        "terms-and-conditions rules restrictions",
        "lang": "语言 语种 lang language locale",
    },
}  # fmt: skip
# What a header must have for its sheet to be of that kind.
NEEDED: dict[SheetKind, tuple[tuple[str, ...], ...]] = {
    "faqs": (("question",), ("answer",)),
    "products": (("title",), ("price",)),
    "promotions": (("title",), ("starts_at", "ends_at")),
}
SEVERAL = ("questions", "tags", "description", "conditions")  # several columns may be one field
_PER_LANGUAGE = ("question", "answer", "questions", "title", "description", "conditions")
_LANGUAGES = {
    "zh": ("中文", "简体中文", "汉语", "chinese", "zhcn", "zh", "cn"),
    "en": ("英文", "英语", "english", "enus", "en"),
}

ALL: tuple[SheetKind, ...] = ("faqs", "products", "promotions")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a sheet are which field: `fields[language][field]` are positions from 0; "" is any language."""

    kind: SheetKind
    fields: Mapping[str, Mapping[str, tuple[int, ...]]]
    header: tuple[str, ...]  # "" where the sheet has none
    unused: tuple[str, ...] = ()  # columns that nothing is taken from
    weak: bool = False  # found by names that say little
    doubts: tuple[str, ...] = ()  # two columns that fit one field equally, as a line for the merchant
    twins: tuple[str, ...] = field(default=())  # languages with columns of their own

    def label(self, name: str, lang: str = "") -> str:
        """Return what the merchant calls a field: the header of its column, else the field's own name."""
        for language in (lang, ""):
            for position in self.fields.get(language, {}).get(name, ()):
                if position < len(self.header) and self.header[position].strip():
                    return " ".join(self.header[position].split())[:60]
        return name


def column_letter(position: int) -> str:
    """Return a column as spreadsheets name it: 0 is A, 26 is AA."""
    letters = ""
    position += 1
    while position:
        position, rest = divmod(position - 1, 26)
        letters = chr(65 + rest) + letters
    return letters


def bare(name: str) -> str:
    """Return a column's name as names are compared."""
    return squash(re.sub(r"[(（\[【<《].*?[)）\]】>》]", "", fold(name))) or squash(name) or name.strip()


def _ranks(kind: SheetKind) -> dict[str, tuple[str, int]]:
    """Return bare name -> (field, rank); ranks from 1000 on say little."""
    found: dict[str, tuple[str, int]] = {}
    for field_name, names in NAMES[kind].items():
        strong, _, weak = names.partition("?")
        for first, part in ((0, strong), (1_000, weak)):
            for rank, name in enumerate(part.split(), start=first):
                found.setdefault(bare(name), (field_name, rank))
        found[bare(field_name)] = (field_name, 0)
    return found


_RANKS = {kind: _ranks(kind) for kind in ALL}


def find_columns(
    header: Sequence[str], kinds: Sequence[SheetKind] = ALL, given: Mapping[str, str] | None = None
) -> Columns | None:
    """
    Return which column is which, for the first of `kinds` the header has all it needs of; None where it has not.

    `given` is field -> column by name, letter (B) or number (2), as the merchant said it; it outranks the table.
    """
    found = [columns for kind in kinds if (columns := _match(header, kind, given or {})) is not None]
    # "标题, 内容" with dates is a promotion before it is a FAQ.
    return min(found, key=lambda columns: (columns.weak, kinds.index(columns.kind))) if found else None


def position_of(header: Sequence[str], column: str) -> int | None:
    """Return the position of a column by its name, else by letter or number; None where there is none such."""
    wanted = bare(column)
    for position, name in enumerate(header):
        if name.strip() and (name.strip() == column.strip() or bare(name) == wanted):
            return position
    text = column.strip().upper()
    if re.fullmatch(r"[1-9]\d{0,3}", text):
        position = int(text) - 1
    elif re.fullmatch(r"[A-Z]{1,2}", text):
        position = 0
        for letter in text:
            position = position * 26 + ord(letter) - 64
        position -= 1
    else:
        return None
    return position if position < len(header) else None


def _match(header: Sequence[str], kind: SheetKind, given: Mapping[str, str]) -> Columns | None:
    chosen: dict[str, dict[str, list[tuple[int, int]]]] = {}  # language -> field -> [(rank, position)]
    taken: set[int] = set()
    for field_name, column in given.items():
        position = position_of(header, column)
        if position is None:
            return None
        chosen.setdefault("", {})[field_name] = [(-1, position)]
        taken.add(position)
    for position, name in enumerate(header):
        if position in taken or not name.strip():
            continue
        match = _field_of(name, kind)
        if match is None:
            continue
        lang, field_name, rank = match
        if field_name in given:
            if field_name == "question" and rank < 1_000:
                chosen.setdefault(lang, {}).setdefault("questions", []).append((rank, position))
            continue
        chosen.setdefault(lang, {}).setdefault(field_name, []).append((rank, position))
    twins = tuple(lang for lang in ("zh", "en") if lang in chosen)
    doubts: list[str] = []
    weak = False
    fields: dict[str, dict[str, tuple[int, ...]]] = {}
    for lang, by_field in chosen.items():
        more = by_field.setdefault("questions", []) if kind == "faqs" else []
        for field_name, matches in by_field.items():
            if field_name == "questions":
                continue
            matches.sort()
            strong = [match for match in matches if match[0] < 1_000]
            if field_name == "question":
                # Another column of questions is other wordings of the first: 标准问 beside 用户问题, 问题1 beside 问题2.
                more.extend(strong[1:])
            elif field_name == "answer" and len(strong) > 1:
                names = " and ".join(repr(header[position].strip()) for _, position in strong[:2])
                doubts.append(f"{names} could both be the answer; say which with --map answer=COLUMN")
            kept = (strong or matches[:1]) if field_name in SEVERAL else matches[:1]
            weak |= matches[0][0] >= 1_000
            fields.setdefault(lang, {})[field_name] = tuple(position for _, position in kept)
        if more:
            fields.setdefault(lang, {})["questions"] = tuple(
                position for _, position in sorted(more, key=lambda m: m[1])
            )
    shared = fields.get("", {})
    for lang in twins or ("",):
        own = {**shared, **fields.get(lang, {})}
        needed = [next((name for name in group if name in own), None) for group in NEEDED[kind]]
        if None in needed or len({own[name] for name in needed if name}) < len(needed):
            return None
    used = {position for by_field in fields.values() for positions in by_field.values() for position in positions}
    unused = tuple(name.strip() for position, name in enumerate(header) if name.strip() and position not in used)
    return Columns(kind, fields, tuple(header), unused, weak, tuple(doubts), twins)


def _field_of(name: str, kind: SheetKind) -> tuple[str, str, int] | None:
    """Return (language, field, rank) of one column name, or None."""
    ranks = _RANKS[kind]
    wanted = bare(name)
    match = ranks.get(wanted)
    if match is not None:
        return "", *match
    shorter = re.sub(r"(?:\d+|[一二三四五六七八九十]+)$", "", wanted)  # 相似问1, 相似问2; question 2
    match = ranks.get(shorter) if shorter != wanted else None
    if match is not None and match[0] in ("question", *SEVERAL):
        return "", *match
    for lang, marks in _LANGUAGES.items():
        for mark in marks:
            for rest in (shorter.removeprefix(mark), shorter.removesuffix(mark)):
                match = ranks.get(rest) if rest and rest != shorter else None
                if match is not None and match[0] in _PER_LANGUAGE:
                    return lang, *match
    return None
