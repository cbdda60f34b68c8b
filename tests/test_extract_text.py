"""One input beside its expected text for each kind of markup that real blogs contain."""

import ast
import bisect
import hashlib
import re
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

import extract_blog_data as x

META = {"title": "My cat", "description": "A cat *story*.", "tags": ["cats"]}


SETTINGS = replace(x.parse_arguments([]), phone_countries=("US",), redact=True, blocked_words=())


def text_of(body: str, is_html: bool = False, line_breaks: str = "keep", meta: dict = META) -> str:
    source = x.strip_markup(body, meta, Counter())
    return x.to_text(source, is_html, meta.get("title", ""), line_breaks, Counter())[0]


SAME = """
so i said *sigh* and **no** and _maybe_ and ~~yes~~ <3 >:( o_O
  b < c & d > e
snake_case_name and 2 * 3 * 4
[video] is what i said, and [that too]
cost $$$ and more $$$
漢字と仮名、한국어 문장입니다。
« guillemets » restent
👩‍👩‍👧 stays joined
array[0] and a {brace}
2001. It was a good year
>_< that hurts
>.< and so does this
"""


@pytest.mark.parametrize("line", [line.strip() for line in SAME.strip().split("\n")])
def test_text_that_stays_as_it_is_typed(line):
    assert text_of(line) == line


@pytest.mark.parametrize("rule", x.NOT_PROSE, ids=lambda rule: rule.kind)
def test_every_kind_of_markup_is_stripped_by_its_own_rule(rule):
    assert x.strip_markup(rule.example, META, Counter()) == rule.result
    assert rule.kind in [found.lastgroup for found in x.SCANNER.finditer(rule.example)]


@pytest.mark.parametrize("tag", sorted(x.DROPPED_TAGS))
def test_what_stands_in_a_dropped_tag_goes(tag):
    assert text_of(f"Mine.\n\n{{% {tag} x %}}\nhers\n{{% end{tag} %}}\n\nMine again.") == "Mine.\n\nMine again."


MARKDOWN = [
    # kramdown attributes
    ('Hello.\n{: .x #y key="v" data-a=b }', "Hello."),
    ('I wrote {:action => "index"} there.', 'I wrote {:action => "index"} there.'),
    ("Hello.\n\n[Press me](/x)\n{: .button .big}", "Hello."),
    # Liquid
    ("{% comment %}no {% comment %} deep{% endcomment %}Hello.", "Hello."),
    ("{% if a %}A{% if b %}B{% else %}C{% endif %}D{% elsif c %}E{% else %}F{% endif %}.", "ABD."),
    ("{% raw %}\n```\ncode\n```\n{% endraw %}\n\nHello.", "Hello."),
    ("See [this]({% post_url 2011-01-01-x %}) or [that][1].\n\n[1]: {{ site.url }}/x", "See this or that."),
    ("{{ page.description }}\n\nHello.", "A cat *story*.\n\nHello."),
    ("{% assign name = 'x' %}Hello {{ name }}you {{ content }}.", "Hello you ."),
    # code
    ("Hello.\n\n~~~\nx = 1;\n~~~\n\nBye.", "Hello.\n\nBye."),
    ("Hello.\n\n```\n\nBye, unclosed.", "Hello.\n\nBye, unclosed."),
    ("Run `ls -l`, then ``a ` b``.", "Run `ls -l`, then `a ` b`."),
    (
        "Hello.\n\n    the sea is wide\n    and i am not\n    but we will sail\n\nBye.",
        "Hello.\n\nthe sea is wide\nand i am not\nbut we will sail\n\nBye.",
    ),
    ("~~~\n\nso that was the week that it was\n\n~~~", "so that was the week that it was"),
    # other people's words and what is no prose
    ('Mine.\n\n<blockquote class="twitter-tweet"><p>Theirs</p></blockquote>\n\nMine.', "Mine.\n\nMine."),
    ('Mine.\n\n<div id="comments"><p>Theirs</p></div>', "Mine."),
    ("Mine.\n\n| a | b |\n| 1 | 2 |\n\nMine.", "Mine.\n\nMine."),
    ("Mine.\n\n- http://example.com/a", "Mine."),
    ("Mine.\n\nPosted via web from somebody's posterous", "Mine."),
    ("<style>p {x: y}</style>\n<script>alert(1)</script>\n\nMine.<iframe src='x'></iframe>", "Mine."),
    # notes, abbreviations, definitions
    ("Mine.[^1] More.\n\n[^1]: The note.", "Mine. More.\n\nThe note."),
    ("HTML is\n\n*[HTML]: Hyper", "HTML is"),
    # lines, lists, headings
    ("one\ntwo  \nthree", "one\ntwo\nthree"),
    ("* a\n* b\n    * c\n* d", "- a\n- b\n  - c\n- d"),
    ("3. a\n4. b", "3. a\n4. b"),
    ("things:\n* a\n* b", "things:\n* a\n* b"),
    ("what i think\n-----\n\nHello.", "what i think\n\nHello."),
    ("# My cat\n\nHello.", "Hello."),
    ("My cat\n\nHello.", "My cat\n\nHello."),
    ("a <em>b</em> <strong> c </strong><i></i> <strike>d</strike>", "a *b* **c** ~~d~~"),
    # characters
    ("it&amp;#039;s &amp;lt;3 &copy; a&nbsp;b", "it's <3 © a b"),
    ("so\u00adft ze\u200bro \u200emark\ufffd a\u200db", "soft zero mark ab"),
    # links without a definition
    ("as [noted][4] and [`code`][x] and [empty]()", "as noted and `code` and empty"),
    ("one<br>\ntwo<br>three", "one\ntwo\nthree"),
    ("`{% raw %}{% raw %}{% endraw %}` is `b`, too", "`{% raw %}` is `b`, too"),
    # HTML blocks that hold Markdown
    ('<div markdown="1">\n\nHello **you**, [link](/x).\n\n</div>', "Hello **you**, link."),
]


HTML = [
    ("<p>one<br>two</p>\n<p>three\nfour</p>", "one\ntwo\n\nthree four"),
    ("one<br /><br />two", "one\n\ntwo"),
    ("one\n\ntwo", "one\n\ntwo"),
    ("<ul><li>a<li>b</ul>c", "- a\n- b\n\nc"),
    ("<p>a <b>b</b> *c* <tt>d</tt></p>", "a **b** *c* `d`"),
    ('<p>a</p><p class="wp-caption-text">cap</p>', "a"),
]


@pytest.mark.parametrize(
    ("body", "expected", "is_html"), [(*row, False) for row in MARKDOWN] + [(*row, True) for row in HTML]
)
def test_what_is_left_of_a_body(body, expected, is_html):
    assert text_of(body, is_html) == expected


WRAPPED = (
    "This paragraph was broken by an editor at a steady width of sixty\n"
    "characters or so, which is why each of its lines stops right\n"
    "where the next word would no longer have fitted, and where no\n"
    "reader would want a line break to be at all in plain text."
)


def test_hard_wrapped_lines_are_joined_with_a_space_unless_they_are_chinese_and_verse_is_not():
    assert text_of(WRAPPED, line_breaks="auto") == WRAPPED.replace("\n", " ")
    assert text_of(WRAPPED, line_breaks="keep") == WRAPPED
    chat = "mossy (10:36:16 PM): hi\nwren (10:36:20 PM): hello you"
    assert text_of(f"{WRAPPED}\n\n{chat}", line_breaks="auto") == WRAPPED.replace("\n", " ")

    verse = "so tired\nof everything, really, all of it\nof you\nand the sea and the boats in it"
    assert text_of(verse, line_breaks="auto") == verse
    assert text_of(verse, line_breaks="join") == verse.replace("\n", " ")
    assert text_of("漢字\n仮名", line_breaks="join") == "漢字仮名"


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Celio*", "Celio*"),
        ("A *loud* **word** &amp; a [link](/x)", "A loud word & a link"),
        ("Tom &#8217;s <em>cat</em>", "Tom ’s cat"),
        ("2001. A year", "2001. A year"),
        ("`code` here", "code here"),
        (None, ""),
    ],
)
def test_titles_become_plain_text(title, expected):
    assert x.clean_title(title) == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("2006-08-25 22:17:00 +0000", date(2006, 8, 25)),
        ("September 8, 2014", date(2014, 9, 8)),
        ("8 Sep 2014", date(2014, 9, 8)),
        ("Mon, 08 Sep 2014 10:00:00 GMT", date(2014, 9, 8)),
        ("2016-07-19 (optional)", date(2016, 7, 19)),
        ("2017-2-5-x.md", date(2017, 2, 5)),
        ("2023-06-31", None),
        ("Jan 8 99999999999", None),
        ("yesterday", None),
        (["2014"], None),
    ],
)
def test_dates(typed, expected):
    assert x.parse_date(typed) == expected


FRONT_MATTER = [
    ("---\ntitle: a\n---\nbody", {"title": "a"}),
    ("--- \ntitle: a\n--- \nbody", {"title": "a"}),
    ("---\ntitle: a\n...\nbody", {"title": "a"}),
    ("---\n---\nbody", {}),
    ("---\ndate: 2023-06-31\nn: None\nt: 12:30\n---\nbody", {"date": "2023-06-31", "n": "None", "t": "12:30"}),
    ("---\na: !ruby/object:Gem {b: c}\n---\nbody", {"a": {"b": "c"}}),
    ("---\njust a string\n---\nbody", {}),
]
BROKEN = [
    ('---\ntitle: "If You\\\'re Going"\nlayout: x\n---\nbody', {"title": "If You're Going", "layout": "x"}),
    ("---\ntitle: one: two\ntags:\n- a\n---\nbody", {"title": "one: two", "tags": ["a"]}),
    ("---\ntitle: a\ntags:\n\t- b\n---\nbody", {"title": "a", "tags": ["b"]}),
    ("---\ntitle: a\nbad: [1, 2\nauthor: me\n---\nbody", {"title": "a", "author": "me"}),
    ("---\ntitle: a\nb: " + "[" * 9000 + "]" * 9000 + "\n---\nbody", {"title": "a"}),
    ("---\ntitle: a\nb: &a [*a]\n---\nbody", {"title": "a"}),
]


@pytest.mark.parametrize(("text", "meta"), [*FRONT_MATTER, *BROKEN])
def test_front_matter_is_read_and_mended_where_it_is_broken(text, meta):
    repairs = Counter()
    assert x.read_front_matter(text, repairs) == (meta, "body")
    assert repairs["front matter repaired"] == ((text, meta) in BROKEN)


@pytest.mark.parametrize("text", ["", "no front matter", "----\na: b\n---\n", "---\nnever closed"])
def test_no_front_matter(text):
    assert x.read_front_matter(text, Counter()) is None


@pytest.mark.parametrize(
    ("data", "text", "repair"),
    [
        (b"\xef\xbb\xbfa\r\nb\rc", "a\nb\nc", ""),
        ("é".encode("utf-16"), "é", ""),
        (b"caf\xe9 \x93hi\x94", "café “hi”", "read as cp1252"),
        ("cafÃ© and itâ€™s".encode(), "café and it’s", "encoding repaired"),
        ("Ärger über Öl".encode(), "Ärger über Öl", ""),
        (b"\x81\x8d", None, ""),
        (b"a\x00b", None, ""),
    ],
)
def test_decode(data, text, repair):
    repairs = Counter()
    assert x.decode(data, repairs) == text
    assert list(+repairs) == ([repair] if repair else [])


@pytest.mark.parametrize(
    ("kind", "row"), [pytest.param(kind, row, id=row.what) for kind, rows in x.PERSONAL_DATA.items() for row in rows]
)
@pytest.mark.parametrize("around", ["{}", "so it is {}, she said", "({})"])
def test_every_example_of_personal_data_is_found_whole(kind, row, around):
    text = around.format(row.example)
    [found] = x.find_personal_data(text, False, SETTINGS.phone_countries)
    assert found.kind == kind
    assert (found.start, found.end) == re.search(row.pattern, text, re.DOTALL).span()


@pytest.mark.parametrize(("country", "number"), [("RU", "8 (912) 345-67-89"), ("IT", "333 1234567")])
def test_a_setting_finds_the_numbers_of_another_country(country, number):
    text = f"ring {number} now"
    found = x.find_personal_data(text, False, [country])
    assert [(one.kind, text[one.start : one.end]) for one in found] == [("phone", number)]
    assert x.find_personal_data(text, False, []) == []


PERSONAL = [
    ("write to Ann.B+c@Example.org now", "write to [email] now", "email", "ann.b+c@example.org"),
    ("ann (at) example [dot] com", "[email]", "email", "ann@example.com"),
    ("ann at example dot com", "[email]", "email", "ann@example.com"),
    ("01 23 45 67 89", "[phone]", "phone", "0123456789"),
    ("02-1234-5678, 089/1234567", "[phone], [phone]", "phone", "0212345678"),
    ("\uc804\ud654\ub294 415-555-0123\uc73c\ub85c", "\uc804\ud654\ub294 [phone]\uc73c\ub85c", "phone", "4155550123"),
    ("\u96fb\u8a71+33 1 23 45 67 89\u3067\u3059", "\u96fb\u8a71[phone]\u3067\u3059", "phone", "33123456789"),
    ("192.0.43.8\uad70\uc694", "[ip]\uad70\uc694", "ip", "192.0.43.8"),
    ("my number is 123-45-6789.", "my number is [secret].", "secret", "123-45-6789"),
    ("ring 4155551234 or +447911123456", "ring [phone] or [phone]", "phone", "4155551234"),
    ("old tam: (555) 555-0163", "old tam: [phone]", "phone", "5555550163"),
    ("DEADBEEF" * 3 + "DEADBEE1", "[secret]", "secret", "DEADBEEF" * 3 + "DEADBEE1"),
    ("https://x.org/?api_key=" + "0a1B2c3d" * 4, "https://x.org/?api_key=[secret]", "secret", "0a1B2c3d" * 4),
    ("https://x.org/#a=1&access_token=" + "0a1B" * 8, "https://x.org/#a=1&access_token=[secret]", "secret", "0a1B" * 8),
    ("https://x.org/?id=ghp_" + "a1B2" * 9, "https://x.org/?id=[secret]", "secret", "ghp_" + "a1B2" * 9),
    ("id=" + "0a1b2c3d" * 4, "id=[secret]", "secret", "0a1b2c3d" * 4),
    (r'"to => wren\@example.com"', '"to => [email]"', "email", "wren@example.com"),
    # cards, each a number that its maker prints in examples
    ("4111 1111 1111 1111 123", "[card] 123", "card", "4111111111111111"),
    ("4111 4111 1111 1111 1111", "4111 [card]", "card", "4111111111111111"),
    ("5555-5555-5555-4444.", "[card].", "card", "5555555555554444"),
    ("3566 0020 2036 0505", "[card]", "card", "3566002020360505"),
    ("6011000990139424", "[card]", "card", "6011000990139424"),
    ("6205 5000 0000 0000 004", "[card]", "card", "6205500000000000004"),
    ("2223 0031 2200 3222", "[card]", "card", "2223003122003222"),
    # accounts
    ("iban DE89 3704 0044 0532 0130 00 KREDITBANK", "iban [iban] KREDITBANK", "iban", "DE89370400440532013000"),
    ("to AT61 1904 3002 3457 3201 BANK", "to [iban] BANK", "iban", "AT611904300234573201"),
    ("gb29nwbk60161331926819", "[iban]", "iban", "GB29NWBK60161331926819"),
    ("NO93-8601-1117-947.", "[iban].", "iban", "NO9386011117947"),
    ("MT84 MALT 0110 0001 2345 MTLC AST0 01S", "[iban]", "iban", "MT84MALT011000012345MTLCAST001S"),
    # addresses of computers; those of IANA
    ("ping 192.0.43.8, or 192.0.43.8.", "ping [ip], or [ip].", "ip", "192.0.43.8"),
    ("http://192.0.43.8:8080/ is mine", "http://[ip]:8080/ is mine", "ip", "192.0.43.8"),
    ("my IP address is 12.34.56.78", "my IP address is [ip]", "ip", "12.34.56.78"),
    ("ssh [2620:0:2d0:0200::8]:22", "ssh [[ip]]:22", "ip", "2620:0:2d0:200::8"),
    ("at 2620:0:2D0:200:0:0:0:8: mine", "at [ip]: mine", "ip", "2620:0:2d0:200::8"),
    ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY----- x", "[secret] x", "secret", None),
]


@pytest.mark.parametrize(("text", "expected", "kind", "normalised"), PERSONAL)
def test_personal_data_is_found_and_redacted(text, expected, kind, normalised):
    found = x.find_personal_data(text, False, SETTINGS.phone_countries)
    assert {item[0] for item in found} == {kind}
    assert normalised is None or found[0][3] == normalised
    post = x.Post("b", "public", "p")
    assert x.clean_for_training(text, post, SETTINGS) == expected
    assert post.redacted == [(kind, item[3]) for item in found]


def test_a_fingerprint_depends_on_the_key_and_on_every_sign():
    prints = {x.fingerprint(typed, key) for typed in ("4155550123", "4155550124", "\ud800") for key in (b"a", b"b")}
    slow = hashlib.scrypt(b"4155550123", salt=b"a", n=2**12, r=8, p=1, dklen=32)
    assert len(prints) == 6
    assert slow.hex() in prints


@pytest.mark.parametrize(
    "text",
    [
        "2006-08-25 22:17:00 and 25.08.2006 and 1998-2004",
        "version 10.2.345.6789, IP 192.168.100.10",
        "ISBN 978-0-306-40615-7 or 0-306-40615-2",
        "1 000 000 people, 100-2000 of them, 3.14159265358979",
        "an integer goes from -2147483648 to +2147483647",
        "look @wren or @wren@example.social",
        "antidisestablishmentarianism-and-so-on-and-so-forth",
        "i was at home, dot",
        # large numbers and loud letters
        "pipe dream number 1000000000000000000000000000000000000000",
        "A" * 40 + " " + "a" * 32 + "rgh",
        # what looks like a card: a wrong last digit, no maker's beginning, a day, a link, a part of a number
        "4111 1111 1111 1112 and 378282246310006",
        "1111 1111 1111 1117 and 9411111111111117",
        "20060825221700 or 1156544220000",
        "twitter.com/x/status/4111111111111111 and ?v=4111111111111111 and #4111111111111111",
        "0.4111111111111111 and 4111111111111111.5 and 4111 1111 1111 1111-2 and 41111111111111111111",
        # what looks like an account
        "GB28 NWBK 6016 1331 9268 19, GB29 NWBK 6016 1331 9268 1, ZZ29 NWBK 6016 1331 9268 19",
        # what looks like somebody's computer, or belongs to everybody
        "127.0.0.1, 10.1.2.3, 172.16.5.4, 192.168.0.17:8080, 169.254.1.1, 0.0.0.0, 255.255.255.0, 224.0.0.251",
        "192.0.2.1, 198.51.100.7, 203.0.113.9, 2001:db8::1, ::1, fe80::1, fd12:3456::1",
        "git@git.example.org:boats/oar.git",
        "1.1.1.1, https://1.1.1.2/dns-query, 8.8.8.8, 9.9.9.9, 93.184.216.34",
        "Firefox 3.6.28.0, Flash 11.2.202.235, version 45.6.7.8, v93.1.2.3, section 3.1.2.4, 12.10.20.05",
        "ruby-93.1.2.3, x/93.1.2.3/y, 93.1.2.3-beta, 93.1.2.3.4, 193.300.2.1",
        "std::string, 2006:08:25 22:17, 10:36:16, 2020:: and 2fab:de:ad",
    ],
)
def test_what_is_no_personal_data(text):
    assert x.find_personal_data(text, False, SETTINGS.phone_countries) == []
    assert x.find_personal_data(text, False, ["FR", "GB", "KR"]) == []


LINKED = [
    "https://example.org/index?s=opportunity&id={}&tab=core",
    "www.example.org/watch?v={}",
    "(http://example.org/x#{})",
]


@pytest.mark.parametrize("key", ["d63c725d5a3006919289698350e3d4b3", "aB3" + "dE4fG5h" * 5])
@pytest.mark.parametrize("link", LINKED)
def test_an_id_in_a_link_stays_in_a_public_post_and_goes_from_a_private_one(link, key):
    text = link.format(key)
    assert x.clean_for_training(text, x.Post("b", "public", "p"), SETTINGS) == text
    assert x.clean_for_training(text, x.Post("b", "private", "p"), SETTINGS) == link.format("[secret]")


BLOCKED = [
    # word or words, text, what becomes of it
    ("Anna", "Anna, ANNA, Anna's, Anna\u2019s", "[private], [private], [private]'s, [private]\u2019s"),
    ("Anna", "Annas Joanna anna2004 annasmith.com", "Annas Joanna anna2004 annasmith.com"),
    ("Anna", "*Anna* _Anna_ @anna anna_04", "*[private]* _[private]_ @[private] [private]_04"),
    ("Anna", "https://x.org/anna/?a=anna", "https://x.org/[private]/?a=[private]"),
    ("Anna", "Annaは、アンナ", "[private]は、アンナ"),
    ("12 Elm Street", "12 elm  street, 12 Elm\nStreet, 12\u00a0Elm-Street", "[private], [private], [private]"),
    ("12 Elm Street", "https://x.org/?q=12+elm+street&a=12%20Elm%20Street", "https://x.org/?q=[private]&a=[private]"),
    ("12 Elm Street", "112 Elm Street, 12 Elm, 12 Elm Streets", "112 Elm Street, 12 Elm, 12 Elm Streets"),
    ("  Acme   Ltd. ", "Acme Ltd., ACME LTD. and Acme Ltd", "[private], [private] and Acme Ltd"),
    ("Zo\u00eb", "ZO\u00cb, zoe\u0308, Zoe", "[private], [private], Zoe"),
    ("Zoe\u0308", "Zo\u00eb", "[private]"),
    ("Zoe", "zoe\u0308 zo\u00eb zoe", "zoe\u0308 zo\u00eb [private]"),
    ("Wei\u00df", "Wei\u00df WEISS weiss WEI\u1e9e Weisse", "[private] [private] [private] [private] Weisse"),
    ("Weiss", "Wei\u00df", "[private]"),
    ("'t Hooft", "\u2019t Hooft and 't hooft", "[private] and [private]"),
    ("\u0130pek", "\u0130pek", "[private]"),
    ("\u5c0f\u660e", "\u6211\u548c\u5c0f\u660e\u53bb", "\u6211\u548c[private]\u53bb"),
    ("C++ (x)", "my C++ (x) and C+ (x)", "my [private] and C+ (x)"),
    ("-Anna-", "Anna-Anna", "[private]-[private]"),
    # beside personal data
    ("anna", "anna@example.com, anna", "[email], [private]"),
    ("june 555-0123", "ring June 555-0123 now", "ring [private] now"),
    ("ring June 555", "ring June 555-0123 now", "[private] now"),
    ("email", "an email to anna@example.com", "an [private] to [email]"),
]


@pytest.mark.parametrize(("word", "text", "expected"), BLOCKED)
def test_private_words_are_replaced(word, text, expected):
    post = x.Post("b", "public", "p")
    assert x.clean_for_training(text, post, replace(SETTINGS, blocked_words=(word.strip(),))) == expected
    assert post.blocked["0"] >= expected.count("[private]")


def test_private_words_go_even_where_nothing_else_is_redacted():
    settings = replace(SETTINGS, redact=False, blocked_words=("Anna",))
    text = x.clean_for_training("Anna, anna@example.com", x.Post("b", "public", "p"), settings)
    assert text == "[private], [private]@example.com"


def test_the_longer_of_two_private_words_is_found_and_each_is_counted_by_its_place():
    post = x.Post("b", "public", "p")
    settings = replace(SETTINGS, blocked_words=("Anna", "Anna Smith", "Smiht", "smith"))
    assert x.clean_for_training("Anna Smith, anna, Smith", post, settings) == "[private], [private], [private]"
    assert post.blocked == {"0": 1, "1": 1, "3": 1}


WRONG_SETTINGS = [
    # kind of mistake, names of settings, values
    ("no list", ["PUBLIC_BLOGS", "PRIVATE_BLOGS", "AUTHORS", "BLOCKED_WORDS"], ["../x", None, {"a"}, 3]),
    ("no list", ["TITLE_REQUESTS", "TAG_REQUESTS", "GENERAL_REQUESTS"], ["Write {}.", None, {"{}"}]),
    ("empty list", ["AUTHORS", "TITLE_REQUESTS", "TAG_REQUESTS", "GENERAL_REQUESTS"], [[], ()]),
    (
        "wrong entry",
        ["PUBLIC_BLOGS", "PRIVATE_BLOGS", "AUTHORS", "GENERAL_REQUESTS"],
        [[""], ["a", " "], [3], [["a"]], ["a\0b"]],
    ),
    ("wrong entry", ["BLOCKED_WORDS"], [[""], ["Anna", "  "], [3], [None], ["Anna", ["Smith"]], ["..."], {"Anna"}]),
    ("wrong entry", ["FOLDERS"], ["_posts", [], [""], ["/_posts"], ["../x"], ["a/../b"], ["."], [3], None]),
    ("wrong entry", ["PHONE_COUNTRIES"], ["US", [""], ["us"], ["USA"], [1], [None], [["US"]]]),
    ("no folder", ["DATA_DIR"], ["", " ", None, 3, ["data"], "a\0b"]),
    ("no yes or no", ["INCLUDE_DRAFTS", "REDACT"], ["no", "", 0, 1, None]),
    ("no whole number", ["MIN_WORDS", "REPLY_DEPTH", "MAX_BYTES"], [0, -1, 1.5, "4", True, None, 10**12]),
    ("no number", ["VALIDATION_SHARE", "SIMILARITY", "MAX_SECONDS"], ["1", True, None, -1, 10**6, [0.1]]),
    ("divides by zero", ["SIMILARITY", "MAX_SECONDS"], [0]),
    ("no word of these", ["LINE_BREAKS"], ["Auto", "", None, True, ["keep"]]),
    ("wrong template", ["TITLE_REQUESTS", "TAG_REQUESTS"], [["no place"], ["{} {}"], ["{}", ""], [3]]),
    ("wrong template", ["REPLY_CONTEXT"], ["", "{}", "{}{}{}", 3, None, ["{}{}"]]),
]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for _, names, values in WRONG_SETTINGS for name in names for value in values]
)
def test_a_setting_of_the_wrong_kind_is_a_sentence_with_the_right_form(name, value):
    with pytest.raises(SystemExit) as stopped:
        x.check_settings({name: value}, x.SETTINGS, "extract_blog_data.py")
    setting = x.SETTINGS[name]
    assert f"{name} in extract_blog_data.py must be " in stopped.value.code
    assert stopped.value.code.endswith(f": {name} = {setting.example}.")


def test_a_section_uses_only_itself_and_sections_above_it():
    source = Path(x.__file__).read_text("utf-8")
    titles = re.findall(r"^# -{64} (.*)$", source, re.MULTILINE)
    starts = [source[: source.index(f"- {title}\n")].count("\n") + 1 for title in titles]
    assert [title for title in titles[1:] if not re.search(f"^    {title} ", x.__doc__, re.MULTILINE)] == []

    # The run, which comes first, may use everything.
    section_of = {}
    used = []
    for node in ast.parse(source).body:
        section = bisect.bisect_right(starts, node.lineno) - 1
        targets = [name for target in getattr(node, "targets", []) for name in ast.walk(target)]
        defined = [getattr(each, "id", getattr(each, "name", "")) for each in (*targets, node)]
        section_of |= dict.fromkeys(defined, section)
        names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
        local = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        local |= {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
        used += [(section, name.id) for name in names if name.id not in local]
    upwards = {(titles[user], name) for user, name in used if section_of.get(name, -1) > user}
    assert {section for section, _ in upwards} == {"the run"}


def test_every_setting_is_checked_and_its_example_is_right():
    block = Path(x.__file__).read_text("utf-8").partition("- settings\n")[2].partition("\n# ---")[0]
    assert re.findall(r"^([A-Z_]+) =", block, re.MULTILINE) == list(x.SETTINGS)
    assert {name.upper() for name in vars(SETTINGS)} == x.SETTINGS.keys() | {"TODAY", "AUTHOR_IS_GIVEN"}
    assert {name for _, names, _ in WRONG_SETTINGS for name in names} == x.SETTINGS.keys()
    for name, setting in x.SETTINGS.items():
        x.check_settings({name: ast.literal_eval(setting.example)}, x.SETTINGS, "x.py")


@pytest.mark.parametrize("deleted", ["AUTHORS", "DATA_DIR", "MIN_WORDS"])
def test_a_setting_whose_line_is_gone_is_said(monkeypatch, deleted):
    monkeypatch.delattr(x, deleted)
    with pytest.raises(SystemExit, match=f"^{deleted} in extract_blog_data.py must be "):
        x.main([])


@pytest.mark.parametrize(
    "flag", [setting.flag for setting in x.SETTINGS.values() if setting.flag not in ("", "--drafts")]
)
def test_a_flag_is_checked_as_its_setting_is(flag):
    with pytest.raises(SystemExit, match=f"argument {flag}: ' ' must be .*--help"):
        x.main([flag, " "])


KINDS = [
    # kind, what it allows, what it does not, a flag's text and its value
    (x.whole(0, 2**32 - 1), [0, 2**32 - 1], [-1, 2**32, True, 1.0, float("nan"), "1", None], "7", 7),
    (x.template(1), ["{{}} {}", "Über {}: {{x}}"], ["no place", "{} {}", "{title}", "{0}", "{!r}", ""], "{}", "{}"),
    (x.template(1), [], ["{", "}", "{} }", "{:>9}", 3, None], "{}", "{}"),
    (x.TEXT, ["", "Zo\u00eb"], ["caf\udce9", "a\0", b"a", None], "", ""),
    (x.FOLDER, ["a", Path("a"), "caf\udce9"], ["", " ", "a\0", b"a", None], "../a", "../a"),
]


@pytest.mark.parametrize(("kind", "allowed", "refused", "text", "value"), KINDS)
def test_a_kind_allows_what_its_words_say(kind, allowed, refused, text, value):
    assert all(map(kind.allows, allowed))
    assert not any(map(kind.allows, refused))
    assert x.flag_type(x.Setting(kind, ""))(text) == value


@pytest.mark.parametrize(
    "token", ["<|endoftext|>", "<|im_start|>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<eos>", "<｜User｜>"]
)
def test_control_tokens_are_broken(token):
    post = x.Post("b", "public", "p")
    safe = x.clean_for_training(f"a {token} b", post, SETTINGS)
    assert token not in safe
    assert safe.replace(" ", "") == f"a{token}b"


@pytest.mark.parametrize(
    ("title", "text", "usable"),
    [
        ("The sea", "I like boats.", True),
        ("Kitten's first day", "It began early.", True),
        ("I like boats", "I like boats. And the sea.", False),
        ("i like...", "I like boats.", False),
        ("untitled", "I like boats.", False),
        ("2004-05-06", "I like boats.", False),
        ("http://example.com/x", "I like boats.", False),
        ("example.com", "I like boats.", False),
        ("raytuna83", "I like boats.", False),
        ("@somebody", "I like boats.", False),
        ("", "I like boats.", False),
        ("[private]", "I like boats.", False),
        ("[private]'s boats", "I like boats.", True),
    ],
)
def test_which_titles_make_a_request(title, text, usable):
    post = x.Post("b", "public", "_posts/2004-05-06-x.md", title=title, text=text)
    request = x.make_request(post, [], SETTINGS)
    assert (bool(title) and f'"{title}"' in request) == usable
    assert usable or request in x.GENERAL_REQUESTS


def test_tags_make_a_request_where_the_title_does_not():
    posts = [x.Post("b", "public", f"{n}.md", text="I like boats.") for n in range(40)]
    requests = {x.make_request(post, ["baking", "blog", "[private]"], SETTINGS) for post in posts}
    about_baking = {request.format("baking") for request in x.TAG_REQUESTS}
    assert requests & about_baking
    assert requests - about_baking
    assert requests - about_baking <= set(x.GENERAL_REQUESTS)
