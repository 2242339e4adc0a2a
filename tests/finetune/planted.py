"""
Personal data planted in dialogues, and clean text that must survive: what the masking is measured on.

Two generators: `planted(seed)` is the one the rules were tuned on, `held_out(seed)` has other templates, other value
shapes and other disguises, and was written before the rules had seen it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

FULL = str.maketrans("0123456789", "０１２３４５６７８９")
MATH = str.maketrans("0123456789", "𝟬𝟭𝟮𝟯𝟰𝟱𝟲𝟳𝟴𝟵")
HANZI = str.maketrans("0123456789", "零一二三四五六七八九")


@dataclass(frozen=True)
class Plant:
    """One planted value: the texts of a dialogue, which kind of datum, and the value as it stands in the text."""

    texts: tuple[str, ...]
    kind: str
    value: str


def luhn_complete(body: str) -> str:
    for check in "0123456789":
        total = 0
        for n, char in enumerate(reversed(body + check)):
            v = int(char) * (1 + n % 2)
            total += v - 9 if v > 9 else v
        if total % 10 == 0:
            return body + check
    raise AssertionError


def id_card(rng: random.Random) -> str:
    body = (
        rng.choice(("110105", "440305", "330106", "510107", "320102"))
        + f"{rng.randint(1950, 2008)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}{rng.randint(1, 999):03}"
    )
    return body + "10X98765432"[sum(int(d) * (1 << (17 - n)) for n, d in enumerate(body)) % 11]


def _digits(rng: random.Random, n: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(n))


def _mobile(rng: random.Random) -> str:
    return "1" + rng.choice("3456789") + _digits(rng, 9)


ZH_NAMES = (
    "张伟",
    "李娜",
    "王小明",
    "刘洋",
    "陈思雨",
    "欧阳倩",
    "赵敏",
    "黄子轩",
    "周杰",
    "吴亦菲",
    "孙悦",
    "郑爽",
    "林志玲",
    "何炅",
    "徐静蕾",
)
EN_NAMES = (
    "Emily Carter",
    "John Smith",
    "Sarah O'Neil",
    "Michael Brown",
    "Olivia Jones",
    "Daniel Kim",
    "Anna Müller",
    "Wei Zhang",
)
ZH_ADDRESSES = (
    "广东省深圳市南山区科技园南路18号2栋301室",
    "北京市朝阳区建国路88号SOHO现代城1号楼502室",
    "上海市浦东新区世纪大道100号环球金融中心25楼",
    "浙江省杭州市西湖区文三路478号华星时代广场A座1201",
    "四川省成都市武侯区天府大道北段1700号5栋2单元1103号",
    "江苏省南京市鼓楼区中山北路30弄5号602室",
    "阳光花园小区3栋2单元501",
    "湖北省武汉市洪山区珞喻路1037号华中科技大学东八舍305室",
)
EN_ADDRESSES = (
    "221B Baker Street, London NW1 6XE",
    "742 Evergreen Terrace, Springfield, IL 62704",
    "1600 Amphitheatre Parkway, Mountain View, CA 94043",
    "Flat 4, 18 Queens Road, Bristol BS8 1QE",
    "350 Fifth Avenue, Apt 12B, New York, NY 10118",
)


def _spaced(rng: random.Random, value: str, sep: str = " ") -> str:
    return sep.join(value)


def _grouped(value: str, sizes: tuple[int, ...], sep: str) -> str:
    out, at = [], 0
    for size in sizes:
        out.append(value[at : at + size])
        at += size
    if at < len(value):
        out.append(value[at:])
    return sep.join(out)


def _phone_zh(rng: random.Random) -> str:
    m = _mobile(rng)
    return rng.choice(
        (
            m,
            m,
            _grouped(m, (3, 4, 4), " "),
            _grouped(m, (3, 4, 4), "-"),
            m.translate(FULL),
            f"+86 {m}",
            f"+86{_grouped(m, (3, 4, 4), '-')}",
            f"0086{m}",
            _spaced(rng, m),
            m[:3] + "\u200b" + m[3:],
            m.translate(HANZI),
            _grouped(m, (3, 4, 4), "."),
            f"0{rng.choice(('10', '21', '755', '571'))}-{rng.randint(2, 8)}{_digits(rng, 7)}",
            f"(0755){rng.randint(2, 8)}{_digits(rng, 7)}",
            f"400-{_digits(rng, 3)}-{_digits(rng, 4)}",
        )
    )


def _phone_en(rng: random.Random) -> str:
    a, b, c = str(rng.randint(201, 989)), str(rng.randint(200, 999)), f"{rng.randint(0, 9999):04}"
    return rng.choice(
        (f"({a}) {b}-{c}", f"{a}-{b}-{c}", f"{a}.{b}.{c}", f"+1 {a} {b} {c}", f"{a}{b}{c}", f"+44 7{_digits(rng, 3)} {_digits(rng, 6)}", f"07{_digits(rng, 3)} {_digits(rng, 6)}", f"020 7946 {c}")
    )  # fmt: skip


def _email(rng: random.Random) -> str:
    user = rng.choice(("emily.carter", "zhang_wei88", "lina+shop", "ok123456", "j-smith", "WANGXM"))
    host = rng.choice(("qq.com", "163.com", "gmail.com", "outlook.com", "mail.example.co.uk", "foxmail.com"))
    at = rng.choice(("@", "@", "@", " @ ", "＠", "(at)", "[at]"))
    return f"{user}{at}{host}"


def _card(rng: random.Random) -> str:
    c = luhn_complete(rng.choice(("6222", "6217", "6228", "4111", "5500")) + _digits(rng, rng.choice((11, 14))))
    return rng.choice((c, c, _grouped(c, (4, 4, 4, 4), " "), _grouped(c, (4, 4, 4, 4), "-"), c.translate(FULL)))


def _id(rng: random.Random) -> str:
    c = id_card(rng)
    return rng.choice((c, c, c.lower(), _grouped(c, (6, 8, 4), " "), c.translate(FULL), c[:6] + c[8:-1]))


def _tracking(rng: random.Random) -> str:
    return rng.choice(
        (
            f"SF{_digits(rng, 13)}",
            f"YT{_digits(rng, 13)}",
            f"JDVA{_digits(rng, 11)}",
            f"1Z999AA1{_digits(rng, 10)}",
            f"EE{_digits(rng, 9)}CN",
            f"DPK{_digits(rng, 12)}",
            f"sf{_digits(rng, 12)}",
            "7" + _digits(rng, 13),
        )
    )


def _order(rng: random.Random) -> str:
    return rng.choice(
        (f"QH-2026-{_digits(rng, 5)}", _digits(rng, 12), f"113-{_digits(rng, 7)}-{_digits(rng, 7)}", f"E{_digits(rng, 14)}", f"20261101{_digits(rng, 8)}")
    )  # fmt: skip


def _plate(rng: random.Random) -> str:
    head = rng.choice("京沪粤浙苏川鄂湘") + rng.choice("ABCDE")
    tail = rng.choice((_digits(rng, 5), f"D{_digits(rng, 5)}", f"8{rng.choice('KXM')}{_digits(rng, 3)}"))
    return head + rng.choice(("", "·", " ")) + tail


def _account(rng: random.Random) -> str:
    return rng.choice(
        (f"wxid_{rng.choice('abcdef')}{_digits(rng, 6)}", f"zhang{_digits(rng, 3)}", f"li-na_{_digits(rng, 4)}")
    )


ZH: dict[str, tuple[Callable[[random.Random], str], tuple[str, ...]]] = {
    "PHONE": (_phone_zh, ("我电话{}谢谢", "打{}联系我", "手机号：{}，下午在", "{}", "换成{}这个号吧", "电话是{}，麻烦尽快", "加急！{}！", "我的号码{}")),
    "EMAIL": (_email, ("发票发到{}吧", "邮箱：{}", "我邮箱是{}，谢谢", "请发{}")),
    "ID": (_id, ("身份证{}", "身份证号是{}，清关用", "清关要的证件号{}", "{}这是我的证件")),
    "CARD": (_card, ("卡号{}", "退到{}这张卡", "我的建行卡是{}，谢谢", "{}")),
    "ADDRESS": (lambda r: r.choice(ZH_ADDRESSES), ("地址：{}", "寄到{}", "改成{}可以吗", "我住在{}，几天能到？", "收货地址是{}", "{}", "麻烦送到{}，谢谢")),
    "NAME": (lambda r: r.choice(ZH_NAMES), ("我叫{}", "收件人：{}", "收货人{}，尽快发", "我叫{}电话13800138000", "姓名 {}", "联系人是{}", "{} 13912345678", "名字写{}吧")),
    "ORDER": (_order, ("订单号{}", "订单{}还没发货", "单号：{}", "帮我查一下{}", "我的订单编号是{}，谢谢")),
    "TRACKING": (_tracking, ("快递单号{}", "顺丰{}到哪了", "运单{}一直没动", "查下{}")),
    "PLATE": (_plate, ("车牌{}", "我车是{}停门口", "车牌号：{}")),
    "ACCOUNT": (_account, ("微信：{}", "加我微信{}", "我的微信号是{}", "vx {}", "微信号{}，方便沟通")),
    "QQ": (lambda r: str(r.randint(10**5, 10**10)), ("QQ{}", "qq：{}", "我QQ号是{}", "加QQ {}")),
}  # fmt: skip
EN: dict[str, tuple[Callable[[random.Random], str], tuple[str, ...]]] = {
    "PHONE": (_phone_en, ("call me at {}", "my number is {}", "Phone: {}", "You can reach me on {} after 6pm", "{}")),
    "EMAIL": (_email, ("send it to {}", "my email is {}.", "Email: {}", "it's {} thanks")),
    "CARD": (_card, ("card number {}", "refund it to {} please", "My card {} was charged twice")),
    "ADDRESS": (lambda r: r.choice(EN_ADDRESSES), ("Ship it to {}", "my address is {}.", "Address: {}", "I live at {}", "please send it to {} instead")),
    "NAME": (lambda r: r.choice(EN_NAMES), ("My name is {}", "Name: {}", "This is {}, I ordered a lamp", "I'm {} and my order is late", "Consignee: {}", "the order is under the name {}", "Thanks,\n{}")),
    "ORDER": (_order, ("order number {}", "Order #{} has not shipped", "where is order {}?", "my order id is {}")),
    "TRACKING": (_tracking, ("tracking number {}", "tracking: {}", "my parcel {} is stuck")),
    "IP": (lambda r: f"{r.randint(1, 223)}.{r.randint(0, 255)}.{r.randint(0, 255)}.{r.randint(1, 254)}", ("my ip is {}", "from {} it fails")),
    "PASSPORT": (lambda r: f"E{_digits(r, 8)}", ("passport {}", "passport number: {}")),
}  # fmt: skip


def planted(seed: int, n: int) -> list[Plant]:
    """Return `n` dialogues with one value each, all kinds in turn, both languages."""
    rng = random.Random(seed)
    pool = [("zh", k) for k in ZH] + [("en", k) for k in EN]
    plants = []
    for i in range(n):
        lang, kind = pool[i % len(pool)]
        make, templates = (ZH if lang == "zh" else EN)[kind]
        value = make(rng)
        text = rng.choice(templates).format(value)
        if lang == "zh" and rng.random() < 0.3:
            text = rng.choice(("你好，", "在吗？", "亲，", "急急急 ")) + text
        plants.append(Plant((text,), kind, value))
    return plants


# --- Held out: other surroundings, shapes and disguises --------------------------------------------------------------

_HELD_ZH_NAMES = ("蒋欣怡", "司马懿轩", "邓超", "冯绍峰", "曹雪芹", "潘石屹", "魏晨", "谢娜", "沈梦辰", "丁一")
_HELD_EN_NAMES = ("Priya Patel", "Robert van Dijk", "Grace Lee", "Mary-Jane Watson", "Tom Hanks", "Lucy Liu")
_HELD_ZH_ADDRESSES = (
    "重庆市渝中区解放碑民权路28号英利国际金融中心1605",
    "陕西省西安市雁塔区小寨东路126号百隆广场B座8层",
    "天津市和平区南京路２１９号天津中心３０１",
    "福建省厦门市思明区软件园二期望海路10号楼之二502室",
    "龙湖时代天街5幢1803室",
    "山东省青岛市市南区香港中路 12 号 丰合广场 C 区 9 楼",
    "湖南省长沙市岳麓区橘子洲街道潇湘中路328号麓枫和苑7栋1单元2204房",
    "河南省新乡市长垣县恼里镇油坊寨村3组",
    "清河新村12号楼4单元301",
)
_HELD_EN_ADDRESSES = (
    "10 Downing Street, London SW1A 2AA",
    "4059 Mt Lee Drive, Los Angeles, CA 90068",
    "Unit 7, 23 Collins Street, Melbourne VIC 3000",
    "1 Infinite Loop, Cupertino, CA 95014",
    "P.O. Box 1234, Austin, TX 78701",
    "77 Massachusetts Ave, Cambridge, MA 02139",
)


def _held_phone(rng: random.Random) -> str:
    m = _mobile(rng)
    return rng.choice(
        (
            m.translate(MATH),
            "（＋86）" + m,
            f"86-{m}",
            "\u2060".join((m[:3], m[3:7], m[7:])),
            _grouped(m, (3, 3, 5), " "),
            _grouped(m, (3, 4, 4), "—"),
            _grouped(m, (3, 4, 4), "·"),
            _grouped(m.translate(FULL), (3, 4, 4), "　"),
            "幺" + m[1:].translate(HANZI),
            "".join(c + "\ufe0f\u20e3" for c in m),
            _grouped(m, (3, 4, 4), "_"),
            f"0{rng.choice(('20', '28', '592', '731'))} {rng.randint(2, 8)}{_digits(rng, 7)}",
            f"8008{_digits(rng, 6)}",
        )
    )


def _held_email(rng: random.Random) -> str:
    user = rng.choice(("m.zhao1990", "buyer_007", "grace.lee", "xiaoming2020"))
    return rng.choice(
        (f"{user}@vip.sina.com", f"{user} at gmail dot com", f"{user}#qq.com", f"{user}艾特163点com", f"{user}@SOHU.COM", f"{user}[at]yahoo[dot]com", f"{user.translate(FULL)}＠ｑｑ．ｃｏｍ")
    )  # fmt: skip


def _held_id(rng: random.Random) -> str:
    c = id_card(rng)
    return rng.choice(
        (
            _grouped(c, (6, 4, 4, 4), "-"),
            "\u200d".join((c[:6], c[6:])),
            c.replace("X", "Ｘ"),
            c.translate(MATH),
            _grouped(c, (3, 3, 4, 4, 4), " "),
        )
    )


HELD: list[tuple[str, Callable[[random.Random], str], tuple[str, ...]]] = [
    ("PHONE", _held_phone, ("到了打{}哈", "收件电话更正为{}", "我妈的手机{}她在家", "原来的号不用了 新的{}", "致电{}即可", "备用：{}", "可以加{}的微信")),
    ("EMAIL", _held_email, ("电子票传{}", "联系我 {} 就行", "you can write to {}", "Contact {} for the invoice")),
    ("ID", _held_id, ("报关身份证号码：{}", "实名信息 {}", "证件{}，姓名待会发", "ID card no {}")),
    ("CARD", _card, ("把钱退回工行{}", "尾号不记得了，完整的是{}", "Visa {}", "please use {} for the refund", "储蓄卡{}收款")),
    ("ADDRESS", lambda r: r.choice(_HELD_ZH_ADDRESSES), ("帮我改到{}", "新的收货地址{}", "发{}，别放驿站", "我搬家了，现在在{}", "快递寄{}，能送上楼吗", "地址改为：{}，电话不变")),
    ("ADDRESS", lambda r: r.choice(_HELD_EN_ADDRESSES), ("I moved to {}", "could you deliver to {}?", "New address: {}", "The parcel should go to {}, not the old one", "{}")),
    ("NAME", lambda r: r.choice(_HELD_ZH_NAMES), ("你好我是{}", "收件人改成{}", "联系人：{} 电话稍后给", "户名{}", "{}，13700001111，下午送", "我的名字叫{}", "签收人是{}", "本人{}，要求退款", "{}收")),
    ("NAME", lambda r: r.choice(_HELD_EN_NAMES), ("It's {} here, my name is {}", "Mr {} ordered it", "please address it to: Name: {}", "Regards,\n{}", "call me {}", "recipient: {}", "The name on the order is {}")),
    ("ORDER", lambda r: r.choice((_digits(r, 18), f"DD{_digits(r, 10)}", f"SO-{_digits(r, 6)}-{_digits(r, 4)}", _digits(r, 9), f"ORD_{_digits(r, 8)}")), ("订单编号：{}", "我那个{}的单子", "Order no. {}", "ref {}", "退款单{}什么时候到账")),
    ("TRACKING", lambda r: r.choice((f"JT{_digits(r, 13)}", f"ZTO{_digits(r, 12)}", f"SF {_digits(r, 4)} {_digits(r, 4)} {_digits(r, 4)}", f"RR{_digits(r, 9)}GB", f"9400 1{_digits(r, 3)} {_digits(r, 4)} {_digits(r, 4)} {_digits(r, 4)} {_digits(r, 2)}", f"JDX{_digits(r, 12)}-1-1")), ("物流单号 {}", "{}签收了吗", "my tracking code is {}", "the courier gave me {}", "极兔{}")),
    ("PLATE", lambda r: r.choice("鲁豫皖闽渝") + r.choice("FGHJK") + r.choice((f"{_digits(r, 2)}A{_digits(r, 2)}", f"F{_digits(r, 5)}", f" {_digits(r, 5)}")), ("送货的车{}堵住了", "我开{}来自提", "车牌是{}")),
    ("ACCOUNT", lambda r: r.choice((f"a_{_digits(r, 5)}", f"meimei{_digits(r, 4)}", f"tiger-{_digits(r, 3)}x")), ("薇信 {}", "加v：{}", "wechat id {}", "My WeChat is {}", "抖音号{}", "可以加我wx:{}")),
    ("QQ", lambda r: str(r.randint(10**6, 10**10)), ("扣扣 {}", "企鹅号{}", "QQ号码是 {} 加下", "my qq is {}")),
    ("IP", lambda r: r.choice((f"10.{r.randint(0, 255)}.{r.randint(0, 255)}.{r.randint(1, 254)}", f"2001:db8:{r.randint(1, 9999)}:1:2:3:4:{r.randint(1, 9999)}", f"fe80::{r.randint(1, 9999)}")), ("登录IP是{}", "my address is {} (ip)", "来自{}的访问")),
    ("PASSPORT", lambda r: r.choice((f"EA{_digits(r, 7)}", f"G{_digits(r, 8)}", f"{r.randint(100, 899)}-{r.randint(10, 99)}-{_digits(r, 4)}")), ("护照号{}", "护照：{}，出国用", "SSN {}", "my passport no is {}")),
    ("PHONE", lambda r: r.choice((f"+61 4{_digits(r, 2)} {_digits(r, 3)} {_digits(r, 3)}", f"1-{r.randint(201, 989)}-{r.randint(200, 999)}-{_digits(r, 4)}", f"+33 6 {_digits(r, 2)} {_digits(r, 2)} {_digits(r, 2)} {_digits(r, 2)}", f"+49 (0)30 {_digits(r, 7)}", f"({r.randint(201, 989)}){r.randint(200, 999)}-{_digits(r, 4)}", "four one five five five five zero one two three", f"+852 {r.randint(2, 9)}{_digits(r, 3)} {_digits(r, 4)}")), ("text me: {}", "My mobile's {}", "ring {} please", "WhatsApp {}", "courier can call {} any time")),
]  # fmt: skip


def held_out(seed: int, n: int) -> list[Plant]:
    """Return `n` dialogues the rules were not tuned on; a fifth answers a question of the agent without any cue."""
    rng = random.Random(seed)
    asked = {
        "NAME": ("请提供一下收件人姓名", "May I have your full name?"),
        "ORDER": ("麻烦提供下订单号", "Could you give me your order number?"),
        "ADDRESS": ("请发一下收货地址", "What is your delivery address?"),
        "ACCOUNT": ("您的微信号是多少？", "What's your WeChat id?"),
    }
    plants = []
    for i in range(n):
        kind, make, templates = HELD[i % len(HELD)]
        value = make(rng)
        if kind in asked and i % 5 == 0:
            english = all(ord(c) < 0x2E80 for c in templates[0])
            plants.append(Plant((asked[kind][english], value), kind, value))
            continue
        template = rng.choice(templates)
        plants.append(Plant((template.replace("{}", value),), kind, value))
    return plants


# --- Clean text ------------------------------------------------------------------------------------------------------

CLEAN = (
    "满299减30，双十一当天11月11日0点开始", "这款WH-1000XM5多少钱？", "优惠券DOUBLE11和SAVE20能一起用吗", "尺寸58×40×30厘米，重4.8公斤", "价格¥1,699.00，定金100元，尾款1599元", "电池20000mAh，功率65W",
    "16:00前付款当天发货，江浙沪1-3天", "你知道3号能到吗", "2026-11-11 10:00开抢，20261112结束", "iPhone 15 Pro Max 256GB 还有货吗", "鞋子有36码42码吗", "130/140/150/160码都有", "微信支付可以吗，支付宝也行？", "QQ音乐会员送吗",
    "我是老客户了", "我是学生，有优惠吗", "我叫了顺丰上门", "我是江苏的，包邮吗", "我在新疆喀什，能送吗", "电话打不通啊", "请问地址怎么改", "订单什么时候发货", "快递单号在哪里看", "身份证需要吗", "QH1034和QH1035有什么区别", "7天无理由退货，15天换货，质保3年",
    "运费8元，偏远地区加15元", "RTX 4090显卡", "SKU QH1001-zh 还有吗", "小姐姐在吗", "先生和女士都能用吗", "我要2个，一共78元", "一二三四五六楼都送吗", "第二件半价，第三件0元", "室温25℃可以用吗", "送货上楼吗，我家六楼没电梯", "路由器能连几个设备", "这条街上有门店吗", "容量4.2升，最高250℃",
    "The lamp is ¥129, or two for ¥239.50", "Do you ship on 2026-11-24 or 24/11/2026?", "Is coupon NEWYEAR2026 still valid?", "It holds 4.2 litres and weighs 4.8 kg", "My order hasn't arrived in 10 days", "I am going to Beijing next week", "I'm so disappointed with this", "Thanks for your help!", "Hi there, is anyone online?",
    "Hello, can I return it within 30 days?", "Where is my order?", "What is the tracking number?", "I bought it at amazon.com last year", "The 55 inch TV, model UN55TU8000", "Version 1.2.3 of the app crashes", "Delivery takes 3-5 business days, 5 items on the way", "Can I pay with WeChat Pay or Alipay?", "Sorry, the red one is sold out",
    "Dear customer, your parcel is on its way", "Is it 58 x 40 x 30 cm?", "Order before 16:00 and it ships today", "From ¥99 shipping is free, below it costs ¥8", "I need 3 lamps and 12 plates", "it costs $1,299.99 with tax", "open Monday to Sunday 9:00-21:00", "I'm a student, do I get a discount?", "The call quality is bad", "My phone is broken", "500 g bag, 12 months warranty",
    "Mon-Sun 09:00-21:00, Christmas closed", "This is great", "Best regards from Berlin", "the address on the invoice is wrong", "name the colours you have", "USB 3.2, 20 Gbps, 100 W", "about 1200000 people bought it", "满10000积分可抵100元", "销量1234567件", "条码6901234567892是哪个", "我要开发票", "查一下物流", "给我退款", "Is this the 2025-2026 model?",
)  # fmt: skip
