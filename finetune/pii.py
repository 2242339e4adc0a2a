"""
Personal data in dialogues -> stable placeholders such as [PHONE_1]. Pure: the standard library only.

Knows what phone numbers, cards, names, addresses … look like in Chinese and English chats, next to Chinese characters,
in full-width, spaced or spelled digits. Does not know whose they are, and asks no model. Masking too much costs a few
words of training text, masking too little leaks a visitor into a model that quotes; so a doubtful long number is
masked, while prices, dates, sizes, article and coupon codes stay (both sides are measured in tests/finetune/test_pii.py).

Works on a folded copy of each text (full-width to ASCII, other digits to 0-9, zero-width characters out) and maps what
it finds back. Text in brackets that is masked already ([NAME_1], JDDC's [姓名x]) is never touched, so masking twice
changes nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

PII_VERSION = "1"  # changes whenever a rule does; imports are stamped with it

# Highest first: where two rules claim a character, the first one names it.
KINDS = (
    "EMAIL", "ID", "CARD", "TRACKING", "PHONE", "ACCOUNT", "PASSPORT", "IP", "ORDER", "PLATE", "SECRET", "ADDRESS",
    "NAME",
)  # fmt: skip
# Found by their shape alone, so a masked text must hold none: what a trainer checks before it starts.
STRUCTURAL = ("EMAIL", "ID", "CARD", "TRACKING", "PHONE", "IP", "ORDER")

PLACEHOLDER = re.compile(r"\[(?:" + "|".join(KINDS) + r")_\d+\]")
_MASKED = re.compile(PLACEHOLDER.pattern + r"|\[[一-龥a-zA-Z]{1,8}x\]")  # the second form is JDDC's
_HOLE = "\x00"  # stands for masked characters in the folded text


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of personal data: `text[start:end]`."""

    start: int
    end: int
    kind: str


def _re(pattern: str, flags: int = 0) -> re.Pattern[str]:
    """Compile with ASCII word boundaries: a Chinese character is no part of a Latin word, so "我wx:abc" has one."""
    return re.compile(pattern, flags | re.ASCII)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- Folding ---------------------------------------------------------------------------------------------------------

_DASHES = dict.fromkeys("‐‑‒–—―−﹣－⁃", "-")
_NUMERALS = (
    {"零": "0", "〇": "0", "幺": "1"}
    | dict(zip("一二三四五六七八九", "123456789", strict=True))
    | dict(zip("壹贰叁肆伍陆柒捌玖", "123456789", strict=True))
)
_NUMERAL_RUN = _re(r"[0-9零〇一二三四五六七八九幺壹贰叁肆伍陆柒捌玖]{7,}")


def _fold_char(char: str) -> str:
    if char in _DASHES:
        return "-"
    category = unicodedata.category(char)
    if category in ("Cf", "Me", "Mn") or char == "\u3164":
        return ""  # zero-width, emoji key caps, combining marks: written between digits to hide them
    if category == "Zs":
        return " "
    digit = unicodedata.digit(char, None)
    if digit is not None:
        return str(int(digit))
    folded = unicodedata.normalize("NFKC", char)
    return folded if len(folded) == 1 else char


def _fold(text: str) -> tuple[str, list[int]]:
    """Return the folded text, and for each of its characters the position in `text`."""
    holes = [False] * len(text)
    for match in _MASKED.finditer(text):
        holes[match.start() : match.end()] = [True] * (match.end() - match.start())
    if text.isascii() and not any(holes):
        return text, list(range(len(text)))
    chars: list[str] = []
    places: list[int] = []
    for n, char in enumerate(text):
        folded = _HOLE if holes[n] else (char if char.isascii() else _fold_char(char))
        if folded:
            chars.append(folded)
            places.append(n)
    folded_text = "".join(chars)

    # Eleven numerals in a row are a telephone number read aloud; "二十三" and "一二" stay words.
    def digits(match: re.Match[str]) -> str:
        return "".join(_NUMERALS.get(c, c) for c in match.group())

    return _NUMERAL_RUN.sub(digits, folded_text), places


# --- Numbers ---------------------------------------------------------------------------------------------------------


def luhn(digits: str) -> bool:
    """Return whether `digits` has a valid Luhn check digit (bank cards)."""
    total = 0
    for n, char in enumerate(reversed(digits)):
        value = int(char) * (1 + n % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def valid_id_card(number: str) -> bool:
    """Return whether an 18-digit Chinese ID number has a possible date and the right check digit (GB 11643-1999)."""
    if not re.fullmatch(r"\d{17}[\dXx]", number) or not _possible_date(number[6:14]):
        return False
    total = sum(int(d) * (1 << (17 - n)) for n, d in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


def _possible_date(digits: str) -> bool:
    """Whether YYYYMMDD (or YYMMDD) could be a birthday."""
    year, month, day = digits[:-4], int(digits[-4:-2]), int(digits[-2:])
    return (len(year) == 2 or 1880 <= int(year) <= 2100) and 1 <= month <= 12 and 1 <= day <= 31


def _compact(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z]", "", text)


_LATIN = r"A-Za-z0-9"
_B = rf"(?<![{_LATIN}])"  # beginning of a Latin word or number; Chinese may touch it, which \b would not allow
_E = rf"(?![{_LATIN}])"
_H = "一-龥"
_SEP = r"[\s\-.·_~]{0,2}"  # what people put between digits

_UNITS_AFTER = _re(
    r"\s*(?:元|块|圆|日元|韩元|美元|人民币|rmb|cny|usd|yuan|dollars?|万|亿|mah|毫安|小时|次|转|rpm|克|g\b|kg|ml|毫升|像素|"
    r"px|流明|lm\b|hz|w\b|瓦|字节|bytes?|人|粉丝|件|个|天|years?|people|customers|reviews)",
    re.IGNORECASE,
)
_MONEY_BEFORE = _re(r"(?:[¥￥$€£]|rmb|cny|usd|价格?|金额|共|总计|合计)\s*$", re.IGNORECASE)
_BARCODE_BEFORE = _re(r"(?:条形?码|barcode|ean|upc|isbn|gtin)[\s:#是为]*$", re.IGNORECASE)

_DIGIT = _re(r"\d")
_RUN = _re(rf"(?<![{_LATIN}.,])(?<!\d[.\-])\d{{7,}}(?![A-Za-z\d])")
_SPACED = _re(r"(?<!\d)\d(?:[ \-._]{0,2}\d){12,24}(?:[ \-]?[Xx])?(?!\d)")
_ID18 = _re(rf"(?<!\d)[1-9](?:{_SEP}\d){{16}}{_SEP}[\dXx](?![{_LATIN}])")
_ID15 = _re(rf"(?<!\d)[1-9](?:{_SEP}\d){{14}}(?!\d)")
_MOBILE = _re(rf"(?<!\d)(?:\(?(?:\+|00)?\(?86\)?{_SEP})?\(?1{_SEP}[3-9](?:{_SEP}\d|{_SEP}\)?\d){{9}}(?!\d)")
_MOBILE_GROUPED = _re(r"(?<!\d)1[3-9]\d\s?[,，/*|、]\s?\d{4}\s?[,，/*|、]\s?\d{4}(?!\d)")
_LANDLINE = _re(
    rf"(?<!\d)(?:\+?86{_SEP})?\(?0(?:10|2\d|[3-9]\d{{2}})\)?[\s\-.]{{0,3}}\d{{3,4}}[\s\-.]?\d{{4}}"
    rf"(?:\s?(?:-|转|ext\.?|x)\s?\d{{1,6}})?(?!\d)"
)
_HOTLINE = _re(r"(?<!\d)[48]00[\s\-.]?\d{3,4}[\s\-.]?\d{3,4}(?!\d)")
_FOREIGN = _re(r"(?<![\d+])(?:\+|00)\s?[1-9]\d{0,2}[\s\-.]{0,2}(?:\(?\d{1,5}\)?[\s\-./]{0,2}){2,6}\d(?!\d)")
_US = _re(
    r"(?<![\d.])(?:1[\s\-.])?(?:\([2-9]\d{2}\)[\s\-.]{0,2}|[2-9]\d{2}[\s\-.]{1,2})\d{3}[\s\-.]\d{4}(?:\s?(?:x|ext\.?)\s?\d{1,5})?(?!\d)"
)
_UK = _re(r"(?<!\d)0(?:7\d{3}|1\d{2,4}|2\d|20)[\s\-]?\d{3,4}[\s\-]?\d{3,4}(?!\d)")
_PHONE_CUE = _re(
    r"(?:电话|座机|手机号?码?|联系方式|号码|致电|拨打|\btel|\bphone|\bmobile|\bcell|\bcall(?: me)?|\bwhatsapp|"
    r"\btext me|\bnumber is|\bfax|传真)[^\d\n]{0,14}(\+?\(?\d[\d\s\-.()]{5,17}\d)(?!\d)",
    re.IGNORECASE,
)
_SPOKEN = _re(
    r"\b(?:(?:zero|oh|one|two|three|four|five|six|seven|eight|nine|double|triple)[\s,.\-]+){6,}"
    r"(?:zero|oh|one|two|three|four|five|six|seven|eight|nine)\b",
    re.IGNORECASE,
)
_FOUR_BY_FOUR = _re(r"(?<!\d)\d{4}([ \-.])\d{4}\1\d{4}\1\d{1,4}(?:\1\d{1,4})*(?!\d)")
_DATE8 = _re(r"(?:19|20)\d{6}")

_EMAIL = _re(
    rf"(?:(?<![A-Za-z0-9._%+\-])[A-Za-z0-9][A-Za-z0-9._%+\-]*|(?<![{_H}])[{_H}]{{2,4}}|[{_H}]{{2,3}})\s?(?:@|[(\[{{<]\s?at\s?[)\]}}>]|艾特)\s?"
    r"[A-Za-z0-9\-]+(?:[.。][A-Za-z0-9\-]+|\s?[.。]\s?(?:com|cn|net|org|uk)|\s?(?:[(\[{]\s?dot\s?[)\]}]|点)\s?[A-Za-z0-9\-]+)+"
    r"|(?<![A-Za-z0-9._%+\-])[A-Za-z0-9][A-Za-z0-9._%+\-]*(?:\s+(?:dot|underscore|dash)\s+[A-Za-z0-9]+)*\s+at\s+[A-Za-z0-9\-]+(?:\s+dot\s+[A-Za-z]+)+"
    r"|(?<![A-Za-z0-9._\-])[A-Za-z0-9._\-]{3,}#(?:qq|163|126|gmail|outlook|hotmail|sina|foxmail|yahoo)[.。](?:com|cn|net)",
    re.IGNORECASE,
)

_IPV4 = _re(r"(?<![\dvV.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.]\d|\d)")
_IPV6 = _re(r"(?<![\w:])(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}(?![\w:])|(?<![\w:])(?:[0-9a-f]{1,4}:){1,6}(?::[0-9a-f]{1,4}){1,6}(?![\w:])|(?<![\w])fe80::[0-9a-f:]+", re.IGNORECASE)  # fmt: skip
_MAC = _re(r"(?<![\w:])(?:[0-9a-f]{2}[:-]){5}[0-9a-f]{2}(?![\w:])", re.IGNORECASE)

_CARRIERS = "SF|YT|YD|ZTO|STO|JDVA|JDVB|JDVC|JDV|JDX|JDK|JD|JT|DPK|DPL|DB|BEST|EMS|UPS|FEDEX|DHL|CN|LP|TBA|HT|KY|ANE|TT"
_TRACKING = _re(
    rf"{_B}(?:(?:{_CARRIERS})[\s\-]?[A-Z]{{0,3}}(?:\d[\s\-]?){{7,18}}\d[A-Z]{{0,2}}|1Z[\s\-]?(?:[0-9A-Z][\s\-]?){{15}}[0-9A-Z]|"
    rf"[A-Z]{{2}}[\s\-]?\d{{3}}[\s\-]?\d{{3}}[\s\-]?\d{{3}}[\s\-]?[A-Z]{{2}}|[A-Z]{{1,4}}\d{{9,}}[A-Z]{{0,3}}){_E}",
    re.IGNORECASE,
)
_TRACKING_CUE = _re(
    r"(?:快递单号?|运单号?|物流单号?|物流号|顺丰|圆通|中通|申通|韵达|极兔|德邦|京东快递|邮政|\btracking(?: (?:number|no|code|id|#))?|"
    r"\bwaybill(?: number| no)?|\bparcel(?: number| no| id)?|\bshipment(?: number| id)?|\bconsignment(?: number)?)"
    rf"[\s:#.是为号码尾的\-]{{0,6}}(?:\bis\b|\bno\b|\bnumber\b)?[\s:#.]{{0,3}}([A-Za-z]{{0,5}}[ \-]?\d[{_LATIN}]*(?:[ \-][A-Za-z]?\d[{_LATIN}]*)*)",
    re.IGNORECASE,
)
_ORDER_CUE = _re(
    r"(?:订单编?号?|单号|交易号|流水号|退款单|售后单|工单号?|发票号码?|会员卡?号|账号|客户编?号|"
    r"\border(?:ed)?(?: (?:number|no|id|ref\w*|code|num))?|\binvoice(?: (?:number|no|id))?|\bref(?:erence)?(?: (?:number|no|code))?|"
    r"\bticket(?: (?:number|no|id))?|\btransaction(?: (?:number|no|id))?|\bmember(?:ship)?(?: (?:number|no|id))?|\bcase(?: (?:number|no|id)))"
    rf"[\s:#.是为号码尾的\-()（）\[\]]{{0,6}}(?:\bis\b|\bwas\b)?[\s:#.\[（(]{{0,3}}([{_LATIN}][{_LATIN}\-_]{{3,36}})",
    re.IGNORECASE,
)
_ORDER_SHAPES = _re(
    rf"{_B}(?:[A-Za-z]{{1,6}}[\-_]?\d{{4,}}[\-_]\d{{3,}}(?:[\-_]\d+)*|\d{{3}}-\d{{7}}-\d{{7}}|"
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|\d{4,}-\d{5,}(?:-\d+)*|"
    rf"(?=[{_LATIN}]*\d[{_LATIN}]*\d[{_LATIN}]*\d[{_LATIN}]*\d[{_LATIN}]*\d[{_LATIN}]*\d)(?=[{_LATIN}]*[A-Za-z])[{_LATIN}]{{12,40}}){_E}",
    re.IGNORECASE,
)

_PROVINCE_LETTER = "京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼"
_PLATE = _re(
    rf"(?:[{_PROVINCE_LETTER}][\s·\-.]{{0,2}}[A-Z][\s·\-.]{{0,2}}(?=(?:[\s·\-.]?[A-Z]){{0,5}}[\s·\-.]?\d)"
    rf"(?:[\s·\-.]?[A-Z0-9]){{4,6}}[挂学警港澳领使]?(?![{_LATIN}]))"
    rf"|{_B}[A-Z]{{2}}\d{{2}}[ ]?[A-Z]{{3}}{_E}"
    r"|(?<=使)\d{6}",
    re.IGNORECASE,
)
_PLATE_UK = _re(rf"{_B}[A-Z]{{2}}\d{{2}}[ ]?[A-Z]{{3}}{_E}")
_PLATE_CUE = _re(
    r"(?:车牌号?码?|\b(?:licen[cs]e )?plates?(?: number| no)?|\bregistration(?: number| no)?|\breg(?: no)?)[\s:#.是为]{0,4}(?:\bis\b)?\s?"
    rf"([{_PROVINCE_LETTER}]?[A-Za-z0-9](?:[\s·\-]?[A-Za-z0-9]){{3,7}})",
    re.IGNORECASE,
)

_ACCOUNT_CUE = _re(
    r"(?:微信号?|薇信|威信|微❤|v信|V信|卫星号|加[微vV薇威]|➕[微vV]|\bwe[ \-]?chat(?: id)?|\bweixin|\bvx|\bwx|\bv x|"
    r"QQ号?码?|扣扣号?|企鹅号?|\bqq(?: number)?|Q号|抖音号?|微博号?|小红书号?|支付宝(?:账号|账户|号)?|旺旺号?|淘宝(?:账号|昵称|id)|"
    r"\btelegram|\bwhatsapp|\bskype(?: id)?|\bline id|\binstagram|\btwitter|\bfacebook|\bsnapchat|\balipay(?: account)?|\busername|\buser ?id|\blogin)"
    r"([\s:=@#\"“”'‘’「是为就叫号码的()\-]{0,8}(?:\bis\b|\bid\b|\bhandle\b|\baccount\b|:)?[\s:=@\"“'「#]{0,3})([A-Za-z0-9][A-Za-z0-9_.\- ]{4,24})",
    re.IGNORECASE,
)
_BARE_QQ = _re(r"(?:加我|加下|加个)(?:好友)?[\s:]*(\d{5,11})(?!\d)")

_PASSPORT = _re(
    rf"{_B}(?:[EGDPSH][A-Z]?\d{{7,8}}|[A-Z]\d{{6}}\(\d\)|[A-Z]\d{{8}}|\d{{3}}-\d{{2}}-\d{{4}}|[A-CEGHJ-PR-TW-Z]{{2}} ?\d{{2}} ?\d{{2}} ?\d{{2}} ?[A-D]){_E}"
)
_PASSPORT_CUE = _re(
    r"(?:护照号?码?|通行证号?码?|居留证号?码?|驾照号?码?|社保号?码?|\bpassport(?: (?:number|no))?|\bssn|\bsocial security(?: number)?|\bdriver'?s licen[cs]e(?: number| no)?|\bnational id|\bid (?:number|no|card))"
    rf"[\s:#.是为]{{0,4}}(?:\bis\b)?\s?([{_LATIN}](?:[ \-]?[{_LATIN}]){{5,17}})",
    re.IGNORECASE,
)
_ID_CUE = _re(r"身份证(?:号码?)?[\s:是为]{0,4}([0-9](?:[ \-]?[0-9Xx]){5,18})")
_SECRET = _re(
    r"(?:验证码|动态码|校验码|取件码|取货码|密码|口令|\bcvv2?|\bcvc|\bpin(?: code)?|\bpasscode|\bpassword|\bverification code|\bone[- ]time code|\botp)"
    rf"[\s:#是为]{{0,4}}(?:\bis\b)?[\s:]{{0,2}}([{_LATIN}\-@!$%&*]*\d[{_LATIN}\-@!$%&*]*)",
    re.IGNORECASE,
)

_SURNAMES = (
    "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎余潘杜戴夏钟汪田任姜范方石姚谭廖邹熊金陆郝孔白崔康毛"
    "邱秦江史顾侯邵孟龙万段漕钱汤尹黎易常武乔贺赖龚文庞樊兰殷施陶洪翟安颜倪严牛温芦季俞章鲁葛伍韦申尤毕聂丛焦向柳邢路岳齐沿梅莫庄辛管祝左涂谷祁时舒耿牟卜肖詹关苗凌费纪靳盛童欧甄项曲成游阳裴席卫查屈鲍位覃霍翁隋植甘景薄单包司柏宁柯阮桂闵解强柴华车冉房边辜吉饶刁瞿戚丘古米池滕晋苑邬臧畅宫来褚娄卓宗"
)
_COMPOUND = "欧阳|上官|司马|诸葛|东方|皇甫|尉迟|公孙|慕容|令狐|司徒|夏侯|独孤|南宫|长孙|宇文|端木|轩辕"
_SUR = rf"(?:{_COMPOUND}|[{_SURNAMES}])"

# --- Addresses -------------------------------------------------------------------------------------------------------

_N = r"(?:[A-Za-z]?\d{1,5}[A-Za-z]?(?:[\-—/]\d{1,4})?|[一二三四五六七八九十百零〇两]{1,6}|[甲乙丙丁ABCDEFGHabcdefgh])"
_W = r"\s{0,2}"
_PROVINCES = (
    "北京|天津|上海|重庆|河北|山西|辽宁|吉林|黑龙江|江苏|浙江|安徽|福建|江西|山东|河南|湖北|湖南|广东|海南|四川|贵州|云南|陕西|甘肃|"
    "青海|台湾|内蒙古|广西|西藏|宁夏|新疆|香港|澳门"
)
_CITIES = (
    "广州|深圳|杭州|南京|苏州|成都|武汉|西安|郑州|长沙|青岛|沈阳|宁波|东莞|无锡|佛山|合肥|大连|福州|厦门|哈尔滨|济南|温州|南宁|长春|泉州|"
    "石家庄|贵阳|南昌|金华|常州|南通|嘉兴|太原|徐州|惠州|珠海|中山|台州|烟台|兰州|绍兴|海口|扬州|汕头|洛阳|昆明|乌鲁木齐|呼和浩特|银川|西宁|拉萨"
)
_ADMIN = rf"(?:(?:(?:{_PROVINCES})(?:省|市|(?:壮族|回族|维吾尔)?自治区|特别行政区)?|[{_H}]{{2,4}}省|(?:{_CITIES})市?|[{_H}]{{2,5}}市){_W}[,，]?{_W})"
_SUBADMIN = rf"(?:[{_H}]{{2,7}}?(?:自治州|地区|盟|市|新区|开发区|高新区|区|自治县|县|旗)(?!别|分|间|域){_W}[,，]?{_W})"
_TOWN = rf"(?:[{_H}]{{1,8}}?(?:街道办?|镇|乡|苏木){_W}[,，]?{_W})"
_ROAD = (
    rf"[{_H}A-Za-z0-9]{{1,12}}?(?:路|街|大道|大街|巷|胡同|公路|环路|(?<!知)(?<!味)(?<!频)(?<!管)(?<!渠)(?<!通)(?<!轨)(?<!报)(?<!难)道)"
    rf"{_W}(?:[东南西北中]段?|[一二三四五六七八九十]段)?{_W}"
)
_ROAD_NUMBER = rf"(?:{_ROAD}{_N}{_W}(?:号(?!线|店|发|到|的货|之前|以后)|弄|巷|#))"
_LANE = rf"(?:[{_H}]{{2,8}}(?:路|街|村){_W}\d{{1,4}}{_W}弄(?:{_W}\d{{1,4}}{_W}号)?)"
_ESTATE = (
    rf"(?:[{_H}A-Za-z0-9]{{2,14}}?(?:小区|花园|花苑|家苑|苑|公寓|大厦|广场|家园|新村|新城|公馆|名都|豪庭|国际|中心|学校|大学|学院|中学|医院|"
    r"工业园区?|产业园|科技园|软件园|社区|宿舍|府邸|府|华庭|庭|湾|园|城|厂区|厂|里|坊|轩|阁|居|院)"
    rf"{_W}(?:[东南西北]区|[一二三四五六七八九十ABCD\d]{{1,2}}[期区])?{_W}{_N}{_W}(?:号楼|号院|栋|幢|座|单元|[楼层](?={_W}{_N})|室))"
)
_BLOCK = rf"(?:(?:[{_H}]{{2,10}}{_W})?{_N}{_W}(?:栋|幢|号楼|座){_W}(?:{_N}{_W}(?:单元|层|楼){_W})?{_N}{_W}(?:室|号|房|户|楼|层)?)"
_UNIT = rf"(?:{_N}{_W}单元{_W}{_N}{_W}(?:室|号|房|户)?)"
_VILLAGE = rf"(?:[{_H}]{{2,8}}村{_W}(?:[{_H}]{{1,4}}[庄屯组]{_W})?{_N}{_W}(?:组|队|社|号))"
_REST = (
    rf"(?:{_W}[,，]?{_W}(?:[{_H}A-Za-z0-9]{{0,14}}?{_N}?{_W}(?:号楼|号院|栋|幢|座|单元|楼|层|室|房(?!间吗)|户|号(?!线|店|发|到)|弄|铺|门面|大厦|广场|中心|"
    rf"花园|小区|公寓|驿站|丰巢柜?|快递柜|菜鸟驿站|学校|大学|院内?)(?:{_W}[A-Z]?\d{{2,4}}(?![\d元块件个]))?))"
)
_CORE = rf"(?:{_ROAD_NUMBER}|{_LANE}|{_ESTATE}|{_BLOCK}|{_UNIT}|{_VILLAGE})"
_ADDRESS_ZH = _re(rf"((?:{_ADMIN})?(?:{_SUBADMIN}){{0,3}}(?:{_TOWN})?){_CORE}(?:{_REST}){{0,5}}")
_ADDRESS_ADMIN = _re(
    rf"(?:{_ADMIN}(?:{_SUBADMIN}){{1,3}}{_TOWN}(?:[{_H}]{{1,8}}村)?|{_ADMIN}(?:{_SUBADMIN}){{1,3}}[{_H}A-Za-z0-9]{{2,14}}?"
    rf"(?:路|街|大道|小区|花园|公寓|大厦|广场|村|大学|学院|中学|小学|医院|家园|苑|新城|工业园)(?:{_REST}){{0,4}})"
)
_ADDRESS_CUE = _re(
    r"(?:(?:收货|收件|寄件|详细|家庭|公司|新|我的?|配送|邮寄|送货|发货|退货)?(?:地址|住址)|住在|家住|寄到|寄往|寄去|送到|发到|邮到|改寄到?)"
    r"\s{0,2}(?:改成|改为|换成|变成|更新为|写的?是|是在|是|为|在|:|：)?[\s:：]{0,3}"
    r"((?!\x00)[^\n。！？!?;；\x00]{4,70})"
)
_ADDRESS_END = _re(
    r"[,，]\s*(?=谢|麻烦|请|可以|行吗|能|什么|多久|几天|我|电话|手机|收)|"
    rf"[\s,，:：]+(?={_SUR}[{_H}]{{1,2}}(?:$|[^{_H}])|\+?[\d\-]{{7}}|电话|手机|收[件货]人|联系)"
)
_PLACE_WORD = _re(rf"[{_H}](?:省|市|区|县|镇|乡|路|街|道|村|号|楼|栋|幢|室|小区|花园|大厦|单元|弄|巷)")
_CORE_ALONE = _re(_CORE)
_SENTENCE = _re(r"[^\n。！？!?；;]+")
_ADDRESS_WORD = _re(rf"[{_H}](?:{_W}{_N})?{_W}(?:路|街|道|巷|胡同|弄|栋|幢|座|单元|楼|室|村|镇|乡|苏木|街道)")
_POSTCODE_ZH = _re(r"邮编[\s:是为]{0,3}(\d{6})")
_TRIGGER = _re(
    rf".*(?:地址|住址|[是到在往至给为:：寄送发去给住帮我您你请]|改成|换成|收货|公司|家里|就是)(?=[{_H}])", re.DOTALL
)

_SUFFIX = (
    "Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Way|Place|Pl|Square|Sq|Terrace|Ter|Close|Crescent|"
    "Cres|Parkway|Pkwy|Highway|Hwy|Gardens|Grove|Row|Mews|Alley|Quay|Circle|Cir|Trail|Loop|Hill|Park|Walk|Wharf|Plaza"
)
_EN_UNIT = (
    r"(?:(?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Fl|Room|Rm|Building|Bldg|Block)\.?\s*#?\s*[\w-]{1,6}|#\s?\w{1,6})"
)
_POSTAL = r"(?:[A-Z]{2}\.?\s+\d{5}(?:-\d{4})?|[A-Z]{1,2}\d[A-Z\d]?\s?\d[A-Z]{2}|[A-Z]\d[A-Z]\s?\d[A-Z]\d|\d{5}(?:-\d{4})?|[A-Z]{2,3}\s\d{4})"
_EN_TAIL = (
    rf"(?:,?\s+{_EN_UNIT})?(?:,\s*(?:[A-Z][A-Za-z.'’\-]+)(?:\s+[A-Z][A-Za-z.'’\-]+){{0,3}}){{0,3}}(?:,?\s+{_POSTAL})?"
    r"(?:,?\s*(?:USA|UK|U\.S\.A?\.?|United States|United Kingdom|England|Canada|Australia|Ireland|China|Singapore|Hong Kong))?"
)
_ADDRESS_EN = _re(
    rf"(?:{_EN_UNIT},?\s+)?{_B}\d{{1,6}}[A-Za-z]?(?:[-/]\d+)?,?\s+(?:[NSEW]\.?\s+|North\s+|South\s+|East\s+|West\s+)?"
    rf"(?:(?:[A-Z][A-Za-z.'’\-]*|\d{{1,3}}(?:st|nd|rd|th)|of|de|la)\s+){{1,4}}(?:{_SUFFIX})\b\.?{_EN_TAIL}"
)
_ADDRESS_EN_LOWER = _re(
    rf"{_B}\d{{1,6}}[a-z]?\s+(?:(?!the\b|on\b|to\b|in\b|of\b|by\b|per\b|and\b|or\b|for\b|a\b|down\b|days?\b|more\b)[a-z.'’\-]+\s+){{1,3}}"
    rf"(?:street|avenue|road|lane|boulevard|drive|court|crescent|terrace)\b(?:,?\s+(?:apt|apartment|unit|suite|flat)\.?\s*#?\w{{1,5}})?"
    rf"(?:,\s*[a-z][a-z '’\-]{{2,24}}){{0,2}}(?:,?\s+(?:[a-z]{{2}}\s+)?\d{{5}})?",
    re.IGNORECASE,
)
_ADDRESS_EN_CUE = _re(
    r"\b(?:(?:shipping|delivery|home|billing|new|my|mailing|full|street|correct)\s+)*address(?: should be| to| is| was|:|=)\s*:?\s*"
    r"((?!\x00)[^\n.?!;\x00]{6,90}(?:\.\s?[A-Z0-9][^\n.?!;\x00]{2,40})?)",
    re.IGNORECASE,
)
_LIVE_CUE = _re(
    r"\b(?:i live at|we live at|deliver (?:it )?to|ship (?:it )?to|send (?:it )?to)\s*:?\s+((?!\x00)\d[^\n.?!;\x00]{6,80})",
    re.I,
)
_PO_BOX = _re(rf"\bP\.?\s?O\.?\s?Box\s+\d+{_EN_TAIL}", re.IGNORECASE)
_POSTCODE_UK = _re(rf"{_B}(?!QH)[A-Z]{{1,2}}\d[A-Z\d]? \d[A-Z]{{2}}{_E}")
_POSTCODE_CUE = _re(
    r"\b(?:post(?:al)? ?code|zip(?: code)?|postcode)[\s:#]{0,3}(?:is\s+)?([A-Z0-9]{2,5}[ \-]?[A-Z0-9]{2,5})", re.I
)
_STATE_ZIP = _re(rf"(?:[A-Z][a-z]+(?:\s[A-Z][a-z]+)?,\s*)?{_B}[A-Z]{{2}}\s+\d{{5}}(?:-\d{{4}})?(?!\d)")

# --- Names -----------------------------------------------------------------------------------------------------------

_AFTER = r"(?=$|[^一-龥]|的|电话|手机|号码|地址|住|你好|您好|请|麻烦|谢|我|你|想|要|在|是|来|买|下单|订|先生|女士|小姐|老师|收|和|就|这|那|之前|昨天|今天|联系)"
_GIVEN = rf"(?:(?![的了吗呢吧啊呀哦是不我你他她它在这那个们])[{_H}])"
_NAME_ZH = rf"(?:{_SUR}{_GIVEN}{{2}}{_AFTER}|{_SUR}{_GIVEN}{_AFTER}|{_SUR}{_GIVEN}{{2}})"
_NAME_STRICT = rf"{_SUR}{_GIVEN}{{1,2}}(?=$|[^一-龥])"
_NAME_CUES: list[re.Pattern[str]] = [
    _re(rf"(?:我叫|我的?名字[是叫]|名叫|叫做|本名)\s{{0,2}}({_NAME_ZH})"),
    _re(
        r"(?:姓名|名字|收[货件]人(?:姓名)?|联系人|签收人|寄件人|发件人|取件人|下单人|户名|开户名|持卡人|顾客|客户名|买家)\s{0,2}(?:改成|改为|换成|写|填|是|为|叫|:|：|\|)"
        rf"\s{{0,2}}((?:{_NAME_ZH}|[{_H}]{{2,4}}(?=$|[^一-龥])))"
    ),
    _re(rf"(?:姓名|收[货件]人(?:姓名)?|联系人|签收人|寄件人|发件人|户名|持卡人)\s{{0,2}}({_NAME_STRICT})"),
    _re(rf"(?:我是|这里是|这边是|本人|我就是)\s{{0,2}}({_NAME_STRICT})"),
    _re(rf"(?:免贵姓|我姓|他姓|她姓|姓)\s{{0,2}}([{_SURNAMES}])(?={_AFTER[3:]}"),
    _re(rf"({_SUR}{_GIVEN}{{0,2}}?)(?=(?:先生|女士|小姐(?!姐)|太太))"),
    _re(
        r"(?:^|[^一-龥])([王李张刘陈杨赵黄周吴徐孙胡朱林何郭马罗梁宋郑谢韩唐冯董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎潘杜戴夏钟汪姜范])(?=(?:阿姨|叔叔|大爷|奶奶|师傅|老师|经理|同学|主管))"
    ),
    _re(rf"(?:我是|叫我|客服|我叫|这里是)\s{{0,2}}((?:小|老|阿)[{_SURNAMES}])(?=$|[^一-龥]|[,，。!！])"),
    _re(rf"(?:^|[\s,，。;；:：])({_SUR}[{_H}]{{1,2}})\s?[(（]?收[)）]?(?=$|[\s,，。;；])"),
    _re(rf"(?:找|联系|转接?给?|交给|给|帮)\s{{0,2}}({_SUR}[{_H}]{{1,2}})(?=(?:签收|代收|接电话|本人))"),
]
_FIELD = _re(r"电话|地址|订单|发票|手机|号码|联系|姓名|先生|女士|本人|客服")
_NAME_STOP = _words(
    "安徽 江苏 江西 宁波 宁夏 石家庄 黄石 温州 金华 成都 常州 常德 万州 余姚 苏州 徐州 郑州 柳州 梅州 邢台 唐山 秦皇岛 武汉 洪都 高中生 高中 高手 高三 高二 高一 马上 时间 时候 常客 "
    "成年 金牌 黄金 白金 白色 黄色 金色 任何 任意 万一 包邮 包装 关于 解决 解释 毕竟 于是 方便 方法 文件 文字 严重 强烈 单独 单品 华为 小米 何时 何种 车主 房东 房主 游客 全部 温馨 "
    "温度 申请 项目 顾客 顾问 客服 和平 祝您 祝你 谢谢 谢了 谢啦 许多 安排 安装 边上 管理 管家 路上 江浙 齐全 易碎 易碎品 左右 米色 苗条 古典 吉祥 景德镇 时效 严格 高级 高档 高清 "
    "平时 向您 来电 来货 成功 成员 金额 查询 查件 卫生间 解锁 施工 凌晨 强化 路由"
)

_FIRST = _words(
    "james john robert michael william david richard joseph thomas charles christopher daniel matthew anthony "
    "donald steven paul andrew joshua kenneth kevin brian george edward ronald timothy jason jeffrey ryan "
    "jacob gary nicholas eric jonathan stephen larry justin scott brandon benjamin samuel gregory frank "
    "alexander raymond patrick jerry dennis tyler aaron jose adam henry nathan douglas zachary peter kyle "
    "walter ethan jeremy harold keith christian roger noah gerald carl terry sean arthur austin liam oliver "
    "mary patricia jennifer linda elizabeth barbara susan jessica sarah karen nancy lisa betty margaret "
    "sandra ashley kimberly emily donna michelle carol amanda melissa deborah stephanie rebecca sharon laura "
    "cynthia kathleen amy angela shirley anna brenda pamela emma nicole helen samantha katherine christine "
    "debra rachel carolyn janet catherine maria heather diane ruth julie olivia joyce virginia victoria kelly "
    "lauren christina joan evelyn judith megan andrea cheryl hannah jacqueline martha gloria teresa ann sara "
    "madison frances kathryn janice jean alice julia judy sophia isabella mia charlotte lucy chloe zoe ella "
    "lily tom mike dave steve chris dan matt jim joe bob kate liz beth sam alex max leo hugo oscar felix wei "
    "ming li"
)
_L = r"A-Za-zÀ-ÖØ-öø-ÿ"
_W_EN = rf"[A-ZÀ-ÖØ-Þ][{_L}'’\-]+"
_NAME_EN = rf"{_W_EN}(?:\s+(?:{_W_EN}|[A-Z](?![{_L}])\.?|de|van|von|der|la|bin|al)){{0,3}}"
_EN_STOP = _words(
    "i i'm im the a an and or but not so very just here there really trying looking going happy sorry sure "
    "glad interested writing calling asking wondering afraid based from in at on with about for to by still "
    "also new using having getting waiting customer team support sir madam all everyone folks order number "
    "monday tuesday wednesday thursday friday saturday sunday january february march april june july august "
    "september october november december china beijing shanghai qinghe english chinese christmas ok okay yes "
    "no hi hello thanks thank please what when where why how which who is are was my your this that it we you "
    "they can could would will do does did great good fine bad mad upset angry done ready back home out off "
    "under over aware only now again like really disappointed confused free available speaking first later "
    "tomorrow asap if before after once when any anytime whenever names"
)
_EN_CUE_STRONG = _re(
    r"(?:\bmy (?:full |first |last |sur|real )?name(?:'s|’s|\s+is|:)|\bname\s*(?:is|:|=)|\bconsignee\s*(?:is|:)?|\brecipient(?:'s name)?\s*(?:is|:)|\battn\.?:?|\bfull name\s*:?|\bcall me|\bsigned by|"
    r"\bunder the name(?: of)?|\bin the name of|\bname on (?:the )?(?:order|card|account)(?: is|:)?|\bcardholder\s*:?|\bcustomer name\s*:?|\bbuyer\s*:|\bdeliver(?:ed)? to\s*:|\bship to\s*:)\s*",
    re.IGNORECASE,
)
_EN_CUE_WEAK = _re(
    r"\b(?:this is|i'm|i’m|im|i am|it's|it’s|speaking (?:to|with)|here is|thanks?,?|thank you,?|regards,?|cheers,?|sincerely,?|hi,?|hello,?|hey,?|dear|sorry,?|sure,?|best,?|yours,?|for|husband|wife|son|daughter|friend|sister|brother|colleague)\s+",
    re.I,
)
_EN_TITLE = _re(rf"\b(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Mister|Sir|Madam|mr|mrs|ms|dr)\b\.?\s+({_NAME_EN}|[a-z]{{3,}})")
_EN_SALUTE = _re(
    rf"(?:^|\n|[.!?]\s)\s*(?:Dear|Hi|Hello|Hey|Good morning|Good afternoon|Good evening),?\s+({_W_EN}(?:\s+{_W_EN})?)(?=\s*[,!.:\n]|\s*$)"
)
_EN_SIGN = _re(
    rf"(?:regards|thanks|thank you|cheers|sincerely|best|yours|faithfully|truly|love)[,!.]?\s*(?:\n|-|—|~)\s*({_NAME_EN})(?=\s*$|\s*\n)",
    re.IGNORECASE,
)
_EN_FULL = _re(rf"{_B}({_W_EN})\s+(?:[A-Z]\.?\s+)?({_W_EN})(?![{_L}])")

_ASKS = {
    "name": _re(
        r"(?:姓名|名字|收[货件]人|联系人|怎么称呼|贵姓|您叫|你叫|\b(?:your|full|the|whose|recipient'?s?|account) name|\bname on|\bmay i have your name|\bwho am i)",
        re.I,
    ),
    "order": _re(
        r"(?:订单号|订单编号|单号|运单|会员号|\border (?:number|no|id|ref)|\btracking (?:number|no|id)|\border #|\bmember(?:ship)? (?:number|id)|\breference)",
        re.I,
    ),
    "address": _re(
        r"(?:地址|寄到哪|送到哪|\baddress\b|\bwhere (?:should|do|shall|would|can) .{0,20}(?:send|ship|deliver))", re.I
    ),
    "account": _re(r"(?:微信|QQ|账号|用户名|昵称|\bwechat|\busername|\baccount (?:id|name))", re.I),
}


def _digits_of(text: str) -> int:
    return sum(c.isdigit() for c in text)


class _Finder:
    """Collects spans of one folded text, the first claim on a character winning."""

    def __init__(self, folded: str, keep: Collection[str]) -> None:
        self.text = folded
        self.claims: list[tuple[int, int, str]] = []
        self._keep = keep

    def add(self, kind: str, start: int, end: int) -> None:
        text = self.text
        while start < end and (text[start].isspace() or text[start] in ",，.。:：;；、-~\"'“”"):
            start += 1
        while end > start and (text[end - 1].isspace() or text[end - 1] in ",，.。:：;；、-~\"'“”!！?？"):
            end -= 1
        if end <= start or _HOLE in text[start:end]:
            return
        if kind not in ("NAME", "ADDRESS") and _compact(text[start:end]).lower() in self._keep:
            return
        self.claims.append((start, end, kind))

    def each(self, kind: str, pattern: re.Pattern[str], check: Callable[[str], bool] = lambda _: True) -> None:
        """Claim every match (its first group where it has one) that `check` accepts."""
        group = 1 if pattern.groups else 0
        for match in pattern.finditer(self.text):
            if match.group(group) and check(match.group(group)):
                self.add(kind, *match.span(group))


def _numbers(f: _Finder) -> None:
    """Claim everything whose shape is a number's or a code's."""
    f.each("EMAIL", _EMAIL)
    for match in _SPOKEN.finditer(f.text):
        f.add("PHONE", *match.span())
    for match in _ACCOUNT_CUE.finditer(f.text):
        _account(f, match)
    if not _DIGIT.search(f.text):
        return
    f.each("ID", _ID18, lambda t: _possible_date(_compact(t)[6:14]) or valid_id_card(_compact(t)))
    f.each("ID", _ID_CUE)
    for match in _SPACED.finditer(f.text):
        if _is_card(match.group()) and not _BARCODE_BEFORE.search(f.text[: match.start()]):
            f.add("CARD", *match.span())
    f.each(
        "CARD",
        _re(
            r"(?:卡号|账户|银行卡|信用卡|\bcard(?: number| no)?|\baccount(?: number| no)?)[^\d\n]{0,10}(\d(?:[ \-]?\d){7,20})",
            re.I,
        ),
    )
    for match in _FOUR_BY_FOUR.finditer(f.text):
        f.add("CARD", *match.span())
    f.each(
        "ID",
        _ID15,
        lambda t: len(_compact(t)) == 15 and _possible_date(_compact(t)[6:12]) and " " not in t.strip()[7:8],
    )
    f.each("TRACKING", _TRACKING, lambda t: _digits_of(t) >= 7 and _digits_of(_compact(t)) * 2 >= len(_compact(t)))
    f.each("TRACKING", _TRACKING_CUE, _codelike)
    f.each("PHONE", _MOBILE)
    f.each("PHONE", _MOBILE_GROUPED)
    f.each("PHONE", _LANDLINE)
    f.each("PHONE", _HOTLINE)
    f.each("PHONE", _FOREIGN, lambda t: 8 <= len(re.sub(r"\D", "", t)) <= 17)
    f.each("PHONE", _US)
    f.each("PHONE", _UK, lambda t: 10 <= len(re.sub(r"\D", "", t)) <= 11)
    f.each("PHONE", _PHONE_CUE, lambda t: len(re.sub(r"\D", "", t)) >= 7 and not _is_date_or_range(t))
    f.each("IP", _IPV4)
    f.each("IP", _IPV6)
    f.each("IP", _MAC)
    f.each("ACCOUNT", _BARE_QQ)
    f.each("PASSPORT", _PASSPORT)
    f.each("PASSPORT", _PASSPORT_CUE, lambda t: _digits_of(t) >= 5)
    f.each("ORDER", _ORDER_CUE, _codelike)
    f.each("ORDER", _ORDER_SHAPES, lambda t: _digits_of(t) >= 6 and not _is_date_or_range(t))
    for match in _RUN.finditer(f.text):
        run, before, after = match.group(), f.text[: match.start()][-14:], f.text[match.end() :][:12]
        if len(run) == 8 and _DATE8.fullmatch(run) and _possible_date(run):
            continue
        if len(run) < 10 and (_UNITS_AFTER.match(after) or _MONEY_BEFORE.search(before)):
            continue
        if len(run) in (8, 12, 13) and _BARCODE_BEFORE.search(before):
            continue
        f.add("ORDER", *match.span())
    for match in _SPACED.finditer(f.text):
        if len(_compact(match.group())) >= 16 and not _is_date_or_range(match.group()):
            f.add("ORDER", *match.span())
    f.each("PLATE", _PLATE, lambda t: t[0] in _PROVINCE_LETTER or t.isupper())
    f.each("PLATE", _PLATE_CUE, lambda t: _digits_of(t) >= 1)
    f.each("SECRET", _SECRET)


def _is_card(text: str) -> bool:
    digits = _compact(text)
    # +86 and a mobile number is 13 digits as well, one in ten with a valid check digit.
    return digits.isdigit() and 13 <= len(digits) <= 19 and luhn(digits) and not re.fullmatch(r"861[3-9]\d{9}", digits)


def _codelike(text: str) -> bool:
    """Whether what follows "order no." is a code: digits enough, or digits among capitals; not "order 3 lamps"."""
    word = text.split()[0] if text.split() else ""
    n = _digits_of(text)
    return n >= 4 and (_digits_of(word) >= 3 or n >= 8) and not _is_date_or_range(text)


def _is_date_or_range(text: str) -> bool:
    return bool(
        re.match(
            r"\s*(?:(?:19|20)\d{2}[\-./ ]\d{1,2}[\-./ ]\d{1,2}|\d{1,2}[\-./]\d{1,2}[\-./](?:19|20)\d{2}|(?:19|20)\d{2}-(?:19|20)\d{2}$)",
            text,
        )
    )


def _account(f: _Finder, match: re.Match[str]) -> None:
    """Claim the id behind "微信" or "QQ", unless it is an ordinary word ("微信 or Alipay", "wechat pay")."""
    between, found = match.group(1), match.group(2)
    start = match.start(2)
    spaced = re.match(r"\d(?:[ \-]?\d){4,11}", found)
    word = spaced.group() if spaced else found.split(" ")[0].rstrip(".-")
    named = any(c in between for c in ":=是为叫号码") or re.search(r"\b(?:is|id|handle|account)\b", between, re.I)
    marked = any(c.isdigit() or c in "_-" for c in word)
    ordinary = word.lower() in (
        "account",
        "payment",
        "alipay",
        "wechat",
        "support",
        "please",
        "number",
        "login",
        "password",
    )
    if len(_compact(word)) >= 5 and (marked or named) and not ordinary:
        f.add("ACCOUNT", start, start + len(word))


def _stretches(text: str) -> list[tuple[int, str]]:
    """Return (offset, stretch) of what may hold a Chinese address: a sentence, cut where it is very long."""
    found = []
    for match in _SENTENCE.finditer(text):
        if _ADDRESS_WORD.search(match.group()):
            # The patterns take time in the square of the length; half a stretch of overlap cuts no address in two.
            for at in range(match.start(), match.end(), 80):
                found.append((at, text[at : min(at + 160, match.end())]))
                if at + 160 >= match.end():
                    break
    return found


def _addresses(f: _Finder) -> None:
    text = f.text
    for offset, stretch in _stretches(text):
        for match in _ADDRESS_ZH.finditer(stretch):
            start = match.start()
            # The lazy classes swallow what stands before: cut up to the last word that leads to an address.
            trigger = _TRIGGER.match(match.group())
            if trigger and _CORE_ALONE.search(match.group(), trigger.end()):
                start += trigger.end()
            f.add("ADDRESS", offset + start, offset + match.end())
        for match in _ADDRESS_ADMIN.finditer(stretch):
            trigger = _TRIGGER.match(match.group())
            f.add("ADDRESS", offset + match.start() + (trigger.end() if trigger else 0), offset + match.end())
    for match in _ADDRESS_CUE.finditer(text):
        rest = match.group(1)
        if re.match(r"错|不对|填|有误|怎么|在哪|能|可以|不|没|信息|还是|里", rest):
            continue
        if (_digits_of(rest) and len(_PLACE_WORD.findall(rest)) >= 1) or len(_PLACE_WORD.findall(rest)) >= 3:
            end = match.start(1) + len(_ADDRESS_END.split(rest)[0])
            f.add("ADDRESS", match.start(1), end)
    f.each("ADDRESS", _POSTCODE_ZH)
    for pattern in (_ADDRESS_EN, _ADDRESS_EN_LOWER, _PO_BOX, _POSTCODE_UK, _STATE_ZIP):
        for match in pattern.finditer(text):
            f.add("ADDRESS", *match.span())
    f.each("ADDRESS", _ADDRESS_EN_CUE, lambda t: bool(re.search(rf"\d\w*,? [A-Z]|\b(?:{_SUFFIX})\b|{_POSTAL}", t)))
    f.each("ADDRESS", _LIVE_CUE, lambda t: bool(re.search(rf"\b(?:{_SUFFIX})\b", t, re.I)))
    f.each("ADDRESS", _POSTCODE_CUE, lambda t: _digits_of(t) >= 2)
    # What overlaps or touches is one address.
    merged: list[tuple[int, int, str]] = []
    for start, end, kind in sorted(f.claims):
        if merged and not text[merged[-1][1] : start].strip(" ,，"):
            merged[-1] = (merged[-1][0], max(merged[-1][1], end), kind)
        else:
            merged.append((start, end, kind))
    f.claims = merged


def _names(f: _Finder, claimed: Callable[[int], str | None]) -> None:
    text = f.text
    for pattern in _NAME_CUES:
        for match in pattern.finditer(text):
            if (
                match.group(1) not in _NAME_STOP
                and not _FIELD.search(match.group(1))
                and match.group(1)[:2] not in ("先生", "女士", "小姐")
            ):
                f.add("NAME", *match.span(1))
    # Beside a masked telephone number or address stands whose it is: "张伟 138…", "…501室 李娜".
    for match in re.finditer(rf"(?:^|(?<=[^{_H}]))({_SUR}[{_H}]{{1,2}})(?=$|[^{_H}])", text):
        before = re.search(r"[^\s,，、:：;；/|]", text[: match.start()][::-1])
        after = re.search(r"[^\s,，、:：;；/|]", text[match.end() :])
        near = []
        if before and before.start() <= 3:
            near.append(claimed(match.start() - before.start() - 1))
        if after and after.start() <= 3:
            near.append(claimed(match.end() + after.start()))
        if {"PHONE", "ADDRESS"} & set(near) and match.group(1) not in _NAME_STOP:
            f.add("NAME", *match.span(1))

    for match in _EN_CUE_STRONG.finditer(text):
        _english_name(f, match.end(), strong=True)
    for match in _EN_CUE_WEAK.finditer(text):
        _english_name(f, match.end(), strong=False)
    for pattern in (_EN_TITLE, _EN_SIGN):
        for match in pattern.finditer(text):
            if match.group(1).split()[0].lower() not in _EN_STOP:
                f.add("NAME", *match.span(1))
    for match in _EN_SALUTE.finditer(text):
        if match.group(1).split()[0].lower() not in _EN_STOP:
            f.add("NAME", *match.span(1))
    for match in _EN_FULL.finditer(text):
        first, last = match.group(1), match.group(2)
        if last.lower() in _EN_STOP or first.lower() in _EN_STOP:
            continue
        beside = {claimed(i) for i in (*range(match.start() - 3, match.start()), *range(match.end(), match.end() + 3))}
        if first.lower() in _FIRST or {"PHONE", "ADDRESS", "EMAIL"} & beside:
            f.add("NAME", *match.span())


def _english_name(f: _Finder, at: int, *, strong: bool) -> None:
    """Claim the words at `at` that can be a name: behind a strong cue in any case, behind a weak one only known ones."""
    words = re.match(rf"[\"“']?((?:[{_L}][{_L}'’\-]*\.?)(?:[ \t]+[{_L}][{_L}'’\-]*\.?){{0,3}})", f.text[at:])
    if not words:
        return
    start = at + words.start(1)
    taken: list[re.Match[str]] = []
    for word in re.finditer(r"\S+", words.group(1)):
        if word.group().lower().strip(".'") in _EN_STOP or len(taken) == (4 if word.group()[0].isupper() else 2):
            break
        particle = word.group().lower() in ("van", "von", "de", "der", "den", "la", "di", "da", "bin", "al", "el")
        if taken and taken[-1].group()[0].isupper() and not word.group()[0].isupper() and not particle:
            break
        taken.append(word)
    if not taken:
        return
    first = taken[0].group().strip(".")
    capital = first[0].isupper() and not first.isupper()
    if not strong:
        known = first.lower() in _FIRST and (capital or len(taken) == 1 or taken[-1].end() == len(words.group(1)))
        if not (
            known
            or (
                capital
                and len(taken) >= 2
                and all(w.group()[0].isupper() for w in taken)
                and f.text[at - 4 : at].strip().lower() in ("is", "am", "'m", "’m", "i'm", "im")
            )
        ):
            return
        if known and not taken[-1].group()[0].isupper():
            taken = taken[:1]
    f.add("NAME", start, start + taken[-1].end())


def find(text: str, *, keep: Collection[str] = (), asked: Collection[str] = ()) -> list[Span]:
    """
    Return what is personal in one text, in order, without overlap.

    `keep` holds values that stay (the store's own telephone number …), compact and lower-case, see `compact_values`.
    `asked` says what the message before asked for ("name", "order", "address", "account"): then a bare answer is one.
    """
    folded, places = _fold(text)
    labels: list[int | None] = [None] * len(folded)
    spans: list[tuple[int, int, str]] = []

    def claim(claims: Sequence[tuple[int, int, str]]) -> None:
        for start, end, kind in sorted(claims, key=lambda c: KINDS.index(c[2])):
            free = [i for i in range(start, end) if labels[i] is None]
            # What a better claim leaves of this one: each stretch with letters or digits in it, by itself.
            while free:
                length = next((n for n in range(1, len(free)) if free[n] != free[n - 1] + 1), len(free))
                stretch, free = free[:length], free[length:]
                a, b = stretch[0], stretch[-1] + 1
                while a < b and not folded[a].isalnum():
                    a += 1
                while b > a and not folded[b - 1].isalnum() and folded[b - 1] not in ")）":
                    b -= 1
                if b > a:
                    labels[a:b] = [len(spans)] * (b - a)
                    spans.append((a, b, kind))

    def kind_at(i: int) -> str | None:
        label = labels[i] if 0 <= i < len(labels) else None
        return None if label is None else spans[label][2]

    finder = _Finder(folded, keep)
    _numbers(finder)
    claim(finder.claims)
    finder.claims = []
    _addresses(finder)
    claim(finder.claims)
    finder.claims = []
    _names(finder, kind_at)
    _bare_answers(finder, asked)
    claim(finder.claims)

    found = []
    for start, end, kind in sorted(spans):
        found.append(Span(places[start], places[end - 1] + 1, kind))
    return found


def _is_name_zh(text: str) -> bool:
    pattern = rf"(?:是|叫|写|就写)?({_SUR}[{_H}]{{1,2}}|[{_H}]{{2,3}})(?:吧|的|呀|哈)?"
    return bool(re.fullmatch(pattern, text)) and text not in _NAME_STOP and text[0] in _SURNAMES


def _is_name_en(text: str) -> bool:
    words = text.split()
    pattern = r"(?:it'?s |its )?[A-Za-z][a-zA-Z'\-]+(?: [A-Za-z][a-zA-Z'\-]+){0,2}"
    if not re.fullmatch(pattern, text) or words[-1].lower() in _EN_STOP:
        return False
    return words[0][0].isupper() or words[0].lower() in _FIRST


def _bare_answers(f: _Finder, asked: Collection[str]) -> None:
    text = f.text.strip(" 。.,，!！~\n")
    start = f.text.find(text) if text else 0
    if "name" in asked and text and (_is_name_zh(text) or _is_name_en(text)):
        f.add("NAME", start, start + len(text))
    if "order" in asked or "account" in asked:
        kind = "ORDER" if "order" in asked else "ACCOUNT"
        for match in re.finditer(rf"{_B}(?=[{_LATIN}_\-]*\d)[{_LATIN}][{_LATIN}_\-]{{4,30}}{_E}", f.text):
            if not _is_date_or_range(match.group()):
                f.add(kind, *match.span())
    if "account" in asked and re.fullmatch(r"[A-Za-z][A-Za-z0-9_\-]{5,19}", text):
        f.add("ACCOUNT", start, start + len(text))
    if (
        "address" in asked
        and 4 < len(text) < 80
        and _digits_of(text)
        and (len(_PLACE_WORD.findall(text)) >= 1 or re.search(rf"\b(?:{_SUFFIX})\b", text))
    ):
        f.add("ADDRESS", start, start + len(text))


def compact_values(values: Collection[str]) -> frozenset[str]:
    """Return `values` as `find` compares them: folded, without separators, lower-case."""
    return frozenset(_compact(_fold(value)[0]).lower() for value in values)


class Masker:
    """
    Masks the texts of one dialogue with placeholders that are numbered through it.

    The same value gets the same placeholder in all texts of a call; a name found once is masked wherever it returns.
    `counts` sums up over calls, by kind.
    """

    def __init__(self, keep: Collection[str] = ()) -> None:
        self._keep = compact_values(keep)
        self.counts: Counter[str] = Counter()

    def mask(self, texts: Sequence[str]) -> list[str]:
        """Return `texts`, in the order they were said, without personal data."""
        found: list[list[Span]] = []
        asked: set[str] = set()
        for text in texts:
            found.append(find(text, keep=self._keep, asked=asked))
            asked = {what for what, pattern in _ASKS.items() if pattern.search(text)}
        self._repeat(texts, found)

        numbers: dict[tuple[str, str], str] = {}
        n_of: Counter[str] = Counter()
        for text in texts:  # numbers of an earlier masking go on
            for match in PLACEHOLDER.finditer(text):
                kind, number = match.group()[1:-1].rsplit("_", 1)
                n_of[kind] = max(n_of[kind], int(number))
        masked = []
        for text, spans in zip(texts, found, strict=True):
            pieces, at = [], 0
            for span in spans:
                key = (span.kind, _key(text[span.start : span.end]))
                if key not in numbers:
                    n_of[span.kind] += 1
                    numbers[key] = f"[{span.kind}_{n_of[span.kind]}]"
                pieces += [text[at : span.start], numbers[key]]
                at = span.end
                self.counts[span.kind] += 1
            masked.append("".join(pieces) + text[at:])
        return masked

    def _repeat(self, texts: Sequence[str], found: list[list[Span]]) -> None:
        """Find again, in all texts, the names and codes that a cue gave away in one of them."""
        values: dict[str, str] = {}
        for text, spans in zip(texts, found, strict=True):
            for span in spans:
                value = text[span.start : span.end]
                if span.kind == "NAME":
                    parts = [value, *(w for w in re.findall(r"[A-Za-z'’\-]+", value) if w[0].isupper())]
                    for part in parts:
                        latin = part.isascii() and len(part) >= 3 and part.lower() not in _EN_STOP
                        if latin or (len(part) >= 2 and not part.isascii()):
                            values[part] = "NAME"
                elif span.kind in ("ORDER", "ACCOUNT", "TRACKING", "PASSPORT", "PLATE") and len(_compact(value)) >= 5:
                    values[value] = span.kind
        if not values:
            return
        # Longest first, so that "Emily Carter" is one name and not two.
        alternatives = "|".join(
            (rf"(?<![{_LATIN}]){re.escape(v)}(?![{_LATIN}])" if v.isascii() else re.escape(v))
            for v in sorted(values, key=len, reverse=True)
        )
        pattern = _re(alternatives)
        for n, text in enumerate(texts):
            taken = [(m.start(), m.end()) for m in _MASKED.finditer(text)] + [(s.start, s.end) for s in found[n]]
            for match in pattern.finditer(text):
                if not any(a < match.end() and match.start() < b for a, b in taken):
                    found[n].append(Span(match.start(), match.end(), values[match.group()]))
            found[n].sort(key=lambda s: s.start)


def _key(value: str) -> str:
    folded = _fold(value)[0]
    return _compact(folded).lower() or folded


def residual(text: str, keep: Collection[str] = frozenset()) -> str | None:
    """Return the kind of the first structural personal datum that `text` still holds, or None. `keep` as for `find`."""
    finder = _Finder(_fold(text)[0], keep)
    _numbers(finder)
    return next((kind for _, _, kind in sorted(finder.claims) if kind in STRUCTURAL), None)
