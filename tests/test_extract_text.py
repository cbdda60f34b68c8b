"""One input beside its expected text for each kind of markup that real blogs contain."""

import re
from collections import Counter
from datetime import date

import pytest

import extract_blog_data as x

META = {"title": "My cat", "description": "A cat *story*.", "tags": ["cats"]}


def text_of(body: str, is_html: bool = False, line_breaks: str = "keep", title: str = "My cat") -> str:
    return x.to_text(x.strip_markup(body, META), is_html, title, line_breaks)


SAME = """
so i said *sigh* and **no** and _maybe_ and ~~yes~~ <3 >:( o_O
all lowercase, odd speling
a line
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
    assert x.strip_markup(rule.example, META) == rule.result
    assert rule.kind in [found.lastgroup for found in x.SCANNER.finditer(rule.example)]


@pytest.mark.parametrize("tag", sorted(x.DROPPED_TAGS))
def test_what_stands_in_a_dropped_tag_goes(tag):
    assert text_of(f"Mine.\n\n{{% {tag} x %}}\nhers\n{{% end{tag} %}}\n\nMine again.") == "Mine.\n\nMine again."


MARKDOWN = [
    # kramdown attributes
    ("Hello.\n{: .lead }", "Hello."),
    ("{: .tldr}\nHello.", "Hello."),
    ("![cat](a.png){: .a .b} Hello.", "Hello."),
    ('Hello.\n{: .x #y key="v" data-a=b }', "Hello."),
    ('I wrote {:action => "index"} there.', 'I wrote {:action => "index"} there.'),
    ("I wrote `{: .code }` and `{{ x }}`.", "I wrote `{: .code }` and `{{ x }}`."),
    ("## Head {#head-1}\n\nHello.", "Head\n\nHello."),
    ("* TOC\n{:toc}\n\nHello.", "Hello."),
    ("1. Contents\n{:toc}\n\nHello.", "Hello."),
    ("{::options parse_block_html='true' /}\n\nHello.", "Hello."),
    ("{::comment}\nsecret\n{:/comment}\n\nHello.", "Hello."),
    ("Hello.\n\n[Press me](/x){: .btn }", "Hello."),
    ("Hello.\n\n[Press me](/x)\n{: .button .big}", "Hello."),
    # Liquid
    ('Hello.\n\n{% include x.html\n  a="1"\n  b="2" %}\n\nBye.', "Hello.\n\nBye."),
    ("Hello {% include x.html %}you.", "Hello you."),
    ("{% highlight ruby %}\nputs 1\n{% endhighlight %}\n\nHello.", "Hello."),
    ("{% codeblock a.rb %}\nputs 1\n{% endcodeblock %}\n\nHello.", "Hello."),
    ("{% comment %}no {% comment %} deep{% endcomment %}Hello.", "Hello."),
    ("{% blockquote Ann %}\nhers\n{% endblockquote %}\n\nMine.", "Mine."),
    ("{% note %}\nMine.\n{% endnote %}", "Mine."),
    ("{% if a %}One.{% else %}Two.{% endif %} Three.", "One. Three."),
    ("{% if a %}A{% if b %}B{% else %}C{% endif %}D{% elsif c %}E{% else %}F{% endif %}.", "ABD."),
    ("{% case a %}{% when 1 %}One{% when 2 %}Two{% endcase %}.", "One."),
    ("{% for p in site.posts %}{{ p.title }}{% endfor %}Hello.", "Hello."),
    ("{% raw %}{{ x }}{% endraw %} stays", "{{ x }} stays"),
    ("{% raw %}\n```\ncode\n```\n{% endraw %}\n\nHello.", "Hello."),
    ("`{% raw %}{% if %}{% endraw %}` is a tag", "`{% if %}` is a tag"),
    ("I work at [18F]({{ site.baseurl }}/about/).", "I work at 18F."),
    ("See [this]({% post_url 2011-01-01-x %}) or [that][1].\n\n[1]: {{ site.url }}/x", "See this or that."),
    ("{{ page.description }}\n\nHello.", "A cat *story*.\n\nHello."),
    ("# {{ page.title }}\n\nHello.", "Hello."),
    ("This is {{ page.title }} again.", "This is My cat again."),
    ("dirais-je {{avec}} une voiture", "dirais-je avec une voiture"),
    ("{% assign name = 'x' %}Hello {{ name }}you {{ content }}.", "Hello you ."),
    # code
    ("Hello.\n\n```ruby\nputs 1\n```\n\nBye.", "Hello.\n\nBye."),
    ("Hello.\n\n~~~\nx = 1;\n~~~\n\nBye.", "Hello.\n\nBye."),
    ("- one\n\n    ```sh\n    ls -l | wc\n    ```\n\n- two", "- one\n- two"),
    ("Hello.\n\n```\n\nBye, unclosed.", "Hello.\n\nBye, unclosed."),
    ("Run `ls -l`, then ``a ` b``.", "Run `ls -l`, then `a ` b`."),
    ("Hello.\n\n    if (x) { return y; }\n    z();\n\nBye.", "Hello.\n\nBye."),
    (
        "Hello.\n\n    the sea is wide\n    and i am not\n    but we will sail\n\nBye.",
        "Hello.\n\nthe sea is wide\nand i am not\nbut we will sail\n\nBye.",
    ),
    ("<div>```js\nx = 1;```</div>\n\nHello.", "Hello."),
    ("~~~\n\nso that was the week that it was\n\n~~~", "so that was the week that it was"),
    # other people's words and what is no prose
    ("Mine.\n\n> Theirs,\nstill theirs.\n\nMine again.", "Mine.\n\nMine again."),
    ('Mine.\n\n<blockquote class="twitter-tweet"><p>Theirs</p></blockquote>\n\nMine.', "Mine.\n\nMine."),
    ('Mine.\n\n<div id="comments"><p>Theirs</p></div>', "Mine."),
    ("Mine.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nMine.", "Mine.\n\nMine."),
    ("Mine.\n\n| a | b |\n| 1 | 2 |\n\nMine.", "Mine.\n\nMine."),
    ("Mine.\n\n<figure><img src='x'><figcaption>Cap</figcaption></figure>\n\nMine.", "Mine.\n\nMine."),
    ("[caption id='a']<img src='x'> A caption[/caption]\n\nMine.", "Mine."),
    ('[gallery ids="1,2"]\n\nMine. [youtube id="x"]', "Mine."),
    ("Mine.\n\nhttp://example.com/a?b=c", "Mine."),
    ("Mine, see http://example.com/ there.", "Mine, see http://example.com/ there."),
    ("Mine.\n\n[one](/1) | [two](/2) | [three](/3)", "Mine."),
    ("Mine.\n\nPosted via web from somebody's posterous", "Mine."),
    ("<style>p {x: y}</style>\n<script>alert(1)</script>\n\nMine.<iframe src='x'></iframe>", "Mine."),
    ("Mine.\n\n$$\nx = 1\n$$\n\nThere are $$N$$ of them.", "Mine.\n\nThere are N of them."),
    # notes, abbreviations, definitions
    ("Mine.[^1] More.\n\n[^1]: The note.", "Mine. More.\n\nThe note."),
    ("Mine.[^9] No note.", "Mine. No note."),
    ("HTML is\n\n*[HTML]: Hyper", "HTML is"),
    ("term\n: what it means", "term\n\nwhat it means"),
    # lines, lists, headings
    ("one\ntwo  \nthree", "one\ntwo\nthree"),
    ("* a\n* b\n    * c\n* d", "- a\n- b\n  - c\n- d"),
    ("3. a\n4. b", "3. a\n4. b"),
    ("things:\n* a\n* b", "things:\n* a\n* b"),
    ("what i think\n-----\n\nHello.", "what i think\n\nHello."),
    ("# My cat\n\nHello.", "Hello."),
    ("My cat\n\nHello.", "My cat\n\nHello."),
    ("Hello.<!--more-->Bye.", "Hello.\n\nBye."),
    ("a <em>b</em> <strong> c </strong><i></i> <strike>d</strike>", "a *b* **c** ~~d~~"),
    ("so *r<iv>ey*", "so *r<iv>ey*"),
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


@pytest.mark.parametrize(("body", "expected"), MARKDOWN)
def test_markdown_to_text(body, expected):
    assert text_of(body) == expected


HTML = [
    ("<p>one<br>two</p>\n<p>three\nfour</p>", "one\ntwo\n\nthree four"),
    ("one<br /><br />two", "one\n\ntwo"),
    ("one\n\ntwo", "one\n\ntwo"),
    ("<ul><li>a<li>b</ul>c", "- a\n- b\n\nc"),
    ("<p>a <b>b</b> *c* <tt>d</tt></p>", "a **b** *c* `d`"),
    ('<p>hi <lj user="mossy"></p>', "hi mossy"),
    ('<p>a</p><p class="wp-caption-text">cap</p>', "a"),
    ("<p>a</p><pre>code</pre><table><tr><td>x</td></tr></table>", "a"),
]


@pytest.mark.parametrize(("body", "expected"), HTML)
def test_html_to_text(body, expected):
    assert text_of(body, is_html=True) == expected


CHATS = [
    "mossy (10:36:16 PM): hi\nwren (10:36:20 PM): hello you",
    "[10:36] <mossy> hi\n[10:37] <wren> hello you\nand on it goes\n[10:38] <mossy> bye",
    "[10:36:01] mossy: hi\n[10:37:02] wren: hello you",
    "mossy: hi\nwren: hello\nmossy: what's up\nwren: nothing",
]


@pytest.mark.parametrize("chat", CHATS)
def test_chat_logs_go_and_what_stands_around_them_stays(chat):
    assert text_of(f"Before.\n\n{chat}\n\nAfter.") == "Before.\n\nAfter."


@pytest.mark.parametrize(
    "text",
    [
        "**5:30 a.m.**: I get up.\n\n**7:00 a.m.**: I bake.",
        "eggs: two\nflour: a cup\nmilk: some\nsalt: no",
        "mossy: hi\nwren: hello",
    ],
)
def test_what_only_looks_like_a_chat_log_stays(text):
    assert text_of(text) == text


WRAPPED = (
    "This paragraph was broken by an editor at a steady width of sixty\n"
    "characters or so, which is why each of its lines stops right\n"
    "where the next word would no longer have fitted, and where no\n"
    "reader would want a line break to be at all in plain text."
)


def test_hard_wrapped_lines_are_joined_and_verse_is_not():
    assert text_of(WRAPPED, line_breaks="auto") == WRAPPED.replace("\n", " ")
    assert text_of(WRAPPED, line_breaks="keep") == WRAPPED
    verse = "so tired\nof everything, really, all of it\nof you\nand the sea and the boats in it"
    assert text_of(verse, line_breaks="auto") == verse
    assert text_of(verse, line_breaks="join") == verse.replace("\n", " ")


def test_a_chat_log_in_a_hard_wrapped_post_goes():
    assert text_of(f"{WRAPPED}\n\n{CHATS[0]}", line_breaks="auto") == WRAPPED.replace("\n", " ")


def test_joined_chinese_gets_no_spaces():
    assert text_of("漢字\n仮名", line_breaks="join") == "漢字仮名"


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Celio*", "Celio*"),
        ("O*NET and more", "O*NET and more"),
        ("A *loud* **word** &amp; a [link](/x)", "A loud word & a link"),
        ("Tom &#8217;s <em>cat</em>", "Tom ’s cat"),
        ("2001. A year", "2001. A year"),
        ("`code` here", "code here"),
        (None, ""),
        (["a"], ""),
    ],
)
def test_titles_become_plain_text(title, expected):
    assert x.clean_title(title) == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("2006-08-25 22:17:00 +0000", date(2006, 8, 25)),
        ("2020-04-30T11:57:36+01:00k", date(2020, 4, 30)),
        ("September 8, 2014", date(2014, 9, 8)),
        ("8 Sep 2014", date(2014, 9, 8)),
        ("Mon, 08 Sep 2014 10:00:00 GMT", date(2014, 9, 8)),
        ("2016-07-19 (optional)", date(2016, 7, 19)),
        ("9999-12-31", date(9999, 12, 31)),
        ("2017-2-5-x.md", date(2017, 2, 5)),
        ("2023-06-31", None),
        ("Jan 8 99999999999", None),
        ("2014-21-01-x.md", None),
        ("yesterday", None),
        (["2014"], None),
        (None, None),
    ],
)
def test_dates(typed, expected):
    assert x.parse_date(typed) == expected


FRONT_MATTER = [
    ("---\ntitle: a\n---\nbody", {"title": "a"}, "body"),
    ("--- \ntitle: a\n--- \nbody", {"title": "a"}, "body"),
    ("---\ntitle: a\n...\nbody", {"title": "a"}, "body"),
    ("---\n---\nbody", {}, "body"),
    ("---\ndate: 2023-06-31\nn: None\nt: 12:30\n---\n", {"date": "2023-06-31", "n": "None", "t": "12:30"}, ""),
    ("---\na: !ruby/object:Gem {b: c}\n---\n", {"a": {"b": "c"}}, ""),
    ("---\njust a string\n---\nbody", {}, "body"),
]
BROKEN = [
    ('---\ntitle: "If You\\\'re Going"\nlayout: x\n---\nbody', {"title": "If You're Going", "layout": "x"}),
    ("---\ntitle: one: two\ntags:\n- a\n---\nbody", {"title": "one: two", "tags": ["a"]}),
    ("---\ntitle: a\ntags:\n\t- b\n---\nbody", {"title": "a", "tags": ["b"]}),
    ("---\ntitle: a\nbad: [1, 2\nauthor: me\n---\nbody", {"title": "a", "author": "me"}),
    ("---\ntitle: a\nb: " + "[" * 9000 + "\n---\nbody", {"title": "a"}),
    ("---\ntitle: a\nb: " + "[" * 9000 + "]" * 9000 + "\n---\nbody", {"title": "a"}),
    ("---\ntitle: a\nb: &a [*a]\n---\nbody", {"title": "a"}),
]


@pytest.mark.parametrize(("text", "meta", "body"), FRONT_MATTER)
def test_front_matter(text, meta, body):
    repairs = Counter()
    assert x.read_front_matter(text, repairs) == (meta, body)
    assert not +repairs


@pytest.mark.parametrize(("text", "meta"), BROKEN)
def test_broken_front_matter_is_mended_and_counted(text, meta):
    repairs = Counter()
    assert x.read_front_matter(text, repairs) == (meta, "body")
    assert repairs["front matter repaired"] == 1


@pytest.mark.parametrize("text", ["", "no front matter", "----\na: b\n---\n", "---\nnever closed"])
def test_no_front_matter(text):
    assert x.read_front_matter(text, Counter()) is None


@pytest.mark.parametrize(
    ("data", "text", "repair"),
    [
        (b"\xef\xbb\xbfa\r\nb\rc", "a\nb\nc", ""),
        ("é".encode("utf-16"), "é", ""),
        (b"caf\xe9 \x93hi\x94", "café “hi”", "read as cp1252"),
        ("cafÃ© and itâ€™s".encode(), "café and it's", "encoding repaired"),
        ("Ärger über Öl".encode(), "Ärger über Öl", ""),
        (b"\x81\x8d", None, ""),
        (b"a\x00b", None, ""),
    ],
)
def test_decode(data, text, repair):
    repairs = Counter()
    decoded = x.decode(data, repairs)
    assert decoded == text or (decoded and decoded.replace("’", "'") == text)
    assert list(+repairs) == ([repair] if repair else [])


@pytest.mark.parametrize("rule", x.PERSONAL_DATA, ids=lambda rule: f"{rule.kind}: {rule.what}")
@pytest.mark.parametrize("around", ["{}", "so it is {}, she said", "({})"])
def test_every_kind_of_personal_data_is_found_by_its_own_rule(rule, around):
    text = around.format(rule.example)
    own = re.search(rule.pattern, text, re.DOTALL)
    assert own
    assert [(kind, start, end) for kind, start, end, _ in x.find_personal_data(text)] == [(rule.kind, *own.span())]


def test_a_row_for_another_country_is_all_that_it_takes(monkeypatch):
    assert x.find_personal_data("ring 8 800 555 35 35 now") == []
    row = x.PersonalData("phone", "Russia", r"8 \d{3} \d{3} \d{2} \d{2}", "8 800 555 35 35")
    monkeypatch.setattr(x, "PERSONAL_DATA", [*x.PERSONAL_DATA, row])
    monkeypatch.setattr(x, "PERSONAL", re.compile(x.any_of("phone")))
    assert x.find_personal_data("ring 8 800 555 35 35 now") == [("phone", 5, 20, "88005553535")]


PERSONAL = [
    ("write to Ann.B+c@Example.org now", "write to [email] now", "email", "ann.b+c@example.org"),
    ("ann [at] example [dot] com", "[email]", "email", "ann@example.com"),
    ("ann (at) example.com", "[email]", "email", "ann@example.com"),
    ("ann at example dot com", "[email]", "email", "ann@example.com"),
    ("call (415) 555-0123 soon", "call [phone] soon", "phone", "4155550123"),
    ("415-555-0123", "[phone]", "phone", "4155550123"),
    ("+33 1 23 45 67 89", "[phone]", "phone", "33123456789"),
    ("01 23 45 67 89", "[phone]", "phone", "0123456789"),
    ("+44 (0)20 7946 0958!", "[phone]!", "phone", "4402079460958"),
    ("call 867-5309", "call [phone]", "phone", "8675309"),
    ("or 555-0123", "or [phone]", "phone", "5550123"),
    ("AKIA" + "ABCDEFGHIJKLMNOP", "[secret]", "secret", "AKIA" + "ABCDEFGHIJKLMNOP"),
    ("ghp_" + "a1B2" * 9, "[secret]", "secret", "ghp_" + "a1B2" * 9),
    ("key aB3" + "dE4fG5h" * 5 + ".", "key [secret].", "secret", "aB3" + "dE4fG5h" * 5),
    ("0123456789abcdef" * 2, "[secret]", "secret", "0123456789abcdef" * 2),
    ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY----- x", "[secret] x", "secret", None),
]


@pytest.mark.parametrize(("text", "expected", "kind", "normalised"), PERSONAL)
def test_personal_data_is_found_and_redacted(text, expected, kind, normalised):
    found = x.find_personal_data(text)
    assert [item[0] for item in found] == [kind]
    assert normalised is None or found[0][3] == normalised
    post = x.Post("b", "public", "p")
    assert x.clean_for_training(text, post) == expected
    assert [(kind, len(digest)) for kind, digest in post.redacted] == [(kind, 64)]


@pytest.mark.parametrize(
    "text",
    [
        "2006-08-25 22:17:00 and 25.08.2006 and 1998-2004",
        "version 10.2.345.6789, IP 192.168.100.10",
        "ISBN 978-0-306-40615-7 or 0-306-40615-2",
        "1 000 000 people, 100-2000 of them, 3.14159265358979",
        "look @wren or @wren@example.social",
        "antidisestablishmentarianism-and-so-on-and-so-forth",
        "i was at home, dot",
    ],
)
def test_what_is_no_personal_data(text):
    assert x.find_personal_data(text) == []


@pytest.mark.parametrize(
    "token", ["<|endoftext|>", "<|im_start|>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<eos>", "<｜User｜>"]
)
def test_control_tokens_are_broken(token):
    post = x.Post("b", "public", "p")
    safe = x.clean_for_training(f"a {token} b", post)
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
        ("(no title)", "I like boats.", False),
        ("2004-05-06", "I like boats.", False),
        ("http://example.com/x", "I like boats.", False),
        ("example.com", "I like boats.", False),
        ("raytuna83", "I like boats.", False),
        ("@somebody", "I like boats.", False),
        ("", "I like boats.", False),
    ],
)
def test_which_titles_make_a_request(title, text, usable):
    post = x.Post("b", "public", "_posts/2004-05-06-x.md", title=title, text=text)
    request = x.make_request(post, [])
    assert (bool(title) and f'"{title}"' in request) == usable
    assert usable or request in x.GENERAL_REQUESTS


def test_tags_make_a_request_where_the_title_does_not():
    requests = {
        x.make_request(x.Post("b", "public", f"{n}.md", text="I like boats."), ["baking", "blog"]) for n in range(40)
    }
    assert any("baking" in request for request in requests)
    assert not any(" blog." in request and "baking" in request for request in requests)
    assert requests & set(x.GENERAL_REQUESTS)
