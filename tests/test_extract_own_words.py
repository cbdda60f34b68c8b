"""What is the author's and what is somebody else's, where markup, themes and tools blur it."""

import re
from collections import Counter

import pytest
from test_extract_blogs import SAMPLE, post, run, run_over
from test_extract_text import text_of

import extract_blog_data as x

BODIES = [
    # a quote ends where an item or heading of the author's begins
    ("- soup\n\n  > hers\n- bread\n- jam", "- soup\n- bread\n- jam"),
    ("1. soup\n   > hers\n2. bread", "1. soup\n2. bread"),
    ("* soup\n    > hers,\n    and hers still\n* bread", "- soup\n- bread"),
    ("+ soup\n\n    > hers\n\n    mine\n\n+ bread", "- soup\n  mine\n- bread"),
    ("> hers\n# A heading of mine\n\nMine.", "A heading of mine\n\nMine."),
    ("> hers\n* * *\nMine.", "Mine."),
    ("> hers\ngoes on\n> to here\n\nMine.", "Mine."),
    ("- soup\n    >_< hot\n- bread", "- soup\n>_< hot\n- bread"),
    # a box for hints is the author's though it is typed as a quote
    ("> So it goes.\n{: .notice--info }", "So it goes."),
    ("{: .box-warning }\n> So it\ngoes.", "So it\ngoes."),
    ("> [!TIP]\n> So it goes.\n>\n> And so on.", "So it goes.\n\nAnd so on."),
    ("> [!info]- Heading\n> So it {% raw %}{{ x }}{% endraw %} goes.", "Heading\nSo it {{ x }} goes."),
    ('<blockquote class="alert"><p>So it goes.</p></blockquote>', "So it goes."),
    ("> [!QUOTE]\n> Theirs.", ""),
    ("> Theirs.\n{: .pull-quote-box }", ""),
    ("> Theirs.\n{: #hers .big }", ""),
    ("> Theirs, to note.\n\nMine.\n{: .notice }", "Mine."),
    # sentences in an include are the author's
    ("{% include tip.html text='I wouldn\\'t go there, would you' %}", "I wouldn't go there, would you"),
    ('{% include x.md type="big one" body="Go.\n\nThen come *back* to me." %}', "Go.\n\nThen come *back* to me."),
    ('{% sidenote "n1" "This is what I said to her." %}', "This is what I said to her."),
    ('So {% newthought "it was in the end" %} that', "So it was in the end that"),
    ('{% include figure.html text="This is what I saw of it." %}', ""),
    ('{% include x.html alt="This is what I saw of it." %}', ""),
    ('{% include x.html text="This is what she wrote." author="Ann" %}', ""),
    ('{% include x.html file="the-end-of-it-all.png" class="a b c d" %}', ""),
    ('{% if page.x == "what I said to her" %}Mine.{% endif %}', "Mine."),
    # a capture that is output is the author's
    ("{% capture a-b %}It was all I had.{% endcapture %}\n<div>{{ a-b | markdownify }}</div>", "It was all I had."),
    ("{% capture x %}\nIt was *all* I had.\n{% endcapture %}\n{% include box.html text=x %}", "It was *all* I had."),
    ("{% capture x %}It was all I had.{% endcapture %}Mine.", "Mine."),
    ("{% capture x %}{{ site.url }}/a/b{% endcapture %}[Mine]({{ x }}).", "Mine."),
    ("{% capture x %}It was all I had.\n\nMine. {{ x }}", "It was all I had.\n\nMine."),
    # the line that says who is quoted goes with the quote
    ("> hers\n\n\u2014 Ann Lee (@annlee) June 3, 2011", ""),
    ("> hers\n\n-- *The Harbour Gazette*, p. 7", ""),
    ("> hers\n\n- Ann Lee, Letters to a Friend", ""),
    ("So.\n\n{% quote %}\nhers\n{% endquote %}\n\u2014 Ann Lee\n\nMine.", "So.\n\nMine."),
    ("On 3 June 2011, Ann Lee wrote:\n\n{% blockquote %}hers{% endblockquote %}\n\nMine.", "Mine."),
    ("So {% quote %}hers{% endquote %}\n\n\u2014 Ann Lee", "So\n\n\u2014 Ann Lee"),
    ("> hers\n\n- Ann\n- Bob", "- Ann\n- Bob"),
    ("> hers\n\n- bread of mine", "- bread of mine"),
    ("> hers\n\n\u2014 and I said so, too", "\u2014 and I said so, too"),
    ("> hers\n\n\u2013 But I never did.", "\u2013 But I never did."),
    ("> hers\n\nMine.\n\n\u2014 Ann Lee", "Mine.\n\n\u2014 Ann Lee"),
    ("Mine.\n\nOn 3 June 2011, Ann Lee wrote:\n> hers\n\nMine.", "Mine.\n\nMine."),
    ("Mine.\nAnn Lee <ann@lee.example> wrote:\n\n> hers", "Mine."),
    ("On the other hand she never wrote:\n\nMine.", "On the other hand she never wrote:\n\nMine."),
    ("Ann wrote:\n\n> hers", "Ann wrote:"),
    # a tag that begins with the name of another does not open it
    (
        "{% quote %}Hers {% quote-mark %} still.{% endquote %} Mine {% quote %}hers{% endquote-mark %}{% endquote %}.",
        "Mine .",
    ),
    # a sentence of links is no menu
    ("[we went ](/a)*[far](/a)*[ out](/a)", "we went *far* out"),
    ("[I was](/a) [so very](/b) [far out.](/c)", "I was so very far out."),
    ("[one.](/a) [two.](/b)", ""),
    ("and [Boats](/a) [Far out](/b)", "and Boats Far out"),
    # the post that is answered goes and a mention of it stays
    ('<div class="h-cite u-repost-of"><p>hers</p></div>\n\nMine.', "Mine."),
    ('<p>Mine, to <a class="u-in-reply-to" href="/x">her post</a>.</p>', "Mine, to her post."),
    ('<p>I read <span class="h-cite"><a class="p-name">The Sea</a></span>.</p>', "I read The Sea."),
    ('<span class="h-cite">She: <q class="e-content">hers</q></span>\n\nMine.', "Mine."),
    ('<div class="h-entry"><div class="e-content">Mine.</div></div>', "Mine."),
    # what a blogging tool adds is no text
    ("**Current Mood:** wet\n_Current music_: The Oars\n\nMine.", "Mine."),
    ("Mine.\n\nx-posted to my other place\n\nTags: boats", "Mine."),
    ("Mine.\nMood: wet\nMusic: none", "Mine."),
    ("Mine.\n\n*This entry was originally posted at http://a.example/1.html.*", "Mine."),
    ("Posted with care, then I left.\n\nMine.", "Posted with care, then I left.\n\nMine."),
    ('Mine.\n\n<div class="wlWriterEditableSmartContent">boats</div><p class="zemanta-pixie">oars</p>', "Mine."),
    ("The current mood of the sea", "The current mood of the sea"),
    # of an address in running text the name of the site stays
    (
        "It is at http://localhost:8080/a/b and at http://boat.example/a.",
        "It is at localhost:8080 and at boat.example.",
    ),
    ("see http://www.example.org/a/b?c=d#e, and", "see example.org, and"),
    ("so (https://en.example.org/wiki/Boat_(film))", "so (en.example.org)"),
    ("at example.com/so/on.", "at example.com."),
    ("at www.example.fr", "at example.fr"),
    ("by http://ann:pass@boats.example:8080/x now", "by boats.example:8080 now"),
    ("at http://192.0.43.8/x now", "at  now"),
    ("run `curl http://a.example/b` there", "run `curl http://a.example/b` there"),
    ("and/or 3.5/4 ann@example.com/x", "and/or 3.5/4 ann@example.com/x"),
    ("<http://a.example/b> is mine", "a.example is mine"),
]


# The same behind a paragraph: a tag with a mistake is no text.
BEHIND_A_PARAGRAPH = [
    ("<img src='a.png'width=3>So it <b>was</b>.", "So it **was**."),
    ('See <a href="/x"b>the boat</a>, <font color="red"">red</font>.', "See the boat, red."),
    ('See <a href="/x" title="a" b">the boat</a>.', "See the boat."),
    ('See <a href="/x>the boat</a> and <a href="/y">the red one</a>.', "See the boat and the red one."),
    ("See [the boat] (http://boat.example/a?b=c).", "See the boat."),
    ("boat.example.com/a/b.png\n\nSee it.", "See it."),
    ('- ["So it](/a) [goes and goes."](/b)', '- "So it goes and goes."'),
    ("i <3 you, 2 < 3 and 4 > 3 = so", "i <3 you, 2 < 3 and 4 > 3 = so"),
]


# The same between two: sayings, captions and links within the page are no text of the author's.
BETWEEN_PARAGRAPHS = [
    ("\u201cBread is patient.\u201d - **Ann Lee**", ""),
    ('*"Bread is patient."* \u2014 Ann Lee, baker', ""),
    ('"Bread is patient." - so I said, and baked.', '"Bread is patient." - so I said, and baked.'),
    ('"Bread" - Ann\'s word - and "butter"', '"Bread" - Ann\'s word - and "butter"'),
    ("![the boat](boat.jpg)\n*The boat at night*", ""),
    ("![the boat](boat.jpg)\n\n*So it goes.*", "*So it goes.*"),
    ("[Back to the top](#top)", ""),
    ("- [Soup](#soup)\n- [Bread](#bread)", ""),
    ("[The boat](/boat)", "The boat"),
    ("*Originally published on the harbour's blog.*", ""),
    ("Originally published on paper, it was wet.", "Originally published on paper, it was wet."),
]


ALL = [("", *row, "") for row in BODIES]
ALL += [("Well.", *row, "") for row in BEHIND_A_PARAGRAPH]
ALL += [("Well.", *row, "So.") for row in BETWEEN_PARAGRAPHS]


@pytest.mark.parametrize(("before", "body", "expected", "behind"), ALL)
def test_the_authors_words_stay_and_other_words_go(before, body, expected, behind):
    paragraphs = filter(None, (before, expected, behind))
    assert text_of("\n\n".join(filter(None, (before, body, behind))), meta={}) == "\n\n".join(paragraphs)


TYPED = [
    ("if i<n, n>j and so on", "if i<n, n>j and so on"),
    ("for (i = 0;i<n;i++) x>y then", "for (i = 0;i<n;i++) x>y then"),
    ("if u<i and b>c we go", "if u<i and b>c we go"),
    ('so<b class="x"> it </b>was<br clear="all">then', "so **it** was\nthen"),
    ("[TOC]\n\nMine, [TOC] too.", "Mine, [TOC] too."),
    ("See [it][a].\n\n[a]: http://example.org/so it goes.mp3", "See it."),
    ('See [it][a].\n\n[a]: http://example.org/x "So it goes"', "See it."),
    ("[a]: not an address at all", "[a]: not an address at all"),
    ('to <lj user="mossy"> and <user site="lj" name="fern"> and <lj comm="boats">', "to mossy and fern and boats"),
    ("a <user> is typed", "a <user> is typed"),
]


@pytest.mark.parametrize("is_html", [False, True])
@pytest.mark.parametrize(("body", "expected"), TYPED)
def test_signs_that_only_look_like_tags_stay_and_residue_goes(body, expected, is_html):
    if not (is_html and body[0] in "[S"):
        assert text_of(body, is_html, meta={}) == expected


def test_the_separator_of_the_excerpt_goes_where_it_stands_alone():
    body = "Mine.\n\n--cut--\n\nMine, `--cut--` too."
    assert text_of(body, meta={"excerpt_separator": "--cut--"}) == "Mine.\n\nMine, `--cut--` too."


# Each holds the word "lost", which goes; the number is that of all words that go with it.
LEFT_OUT = [
    ("> lost", "quotes", 1),
    ("{% quote Ann %}lost{% endquote %}", "quotes", 4),
    ("> hers\n\n\u2014 Lost Ann", "quotes", 3),
    ("```\nlost = 1\n```", "code", 2),
    ("    lost = lost();\n", "code", 2),
    ("$$\nlost\n$$", "code", 1),
    ("| lost |\n|---|\n| lost |", "tables", 2),
    ("<table><tr><td>lost</td></tr></table>", "tables", 1),
    ("![lost cat](a.png)", "captions", 2),
    ("<figure><figcaption>lost</figcaption></figure>", "captions", 1),
    ("[Lost](/a) [Found](/b)", "menus", 2),
    ("<nav>lost</nav>", "menus", 1),
    ("https://lost.example/lost", "bare links", 4),
    ("Mine, at https://lost.example/lost", "bare links", 2),
    ("{% lost %}", x.LIQUID, 1),
    ("{% if a %}{% else %}lost{% endif %}", x.LIQUID, 5),
    ("<!-- lost -->", "comments in the source", 1),
    ("Technorati Tags: lost", "tails", 3),
    ('<div class="blogger-post-footer">lost</div>', "themes and tools", 1),
    ("<b class='lost'>Mine</b> [Mine](/lost)", "markup", 5),
    ("[Mine][a]\n\n[a]: http://lost.example/", "markup", 5),
]


@pytest.mark.parametrize(("body", "kind", "number"), LEFT_OUT)
def test_the_ledger_names_what_is_left_out(body, kind, number):
    left_out = Counter()
    source = x.strip_markup(f"{body}\n\nMine remain.", {}, left_out)
    text, _ = x.to_text(source, False, "", "keep", left_out)
    assert text.endswith("Mine remain.")
    assert "ost" not in text.removesuffix("Mine remain.").replace("lost.example", "")
    assert left_out[kind] == number
    assert x.count_words(f"{body}\n\nMine remain.") == x.count_words(text) + sum(left_out.values())


def test_a_word_that_the_parser_loses_is_no_markup():
    left_out = Counter()
    tree = x.BeautifulSoup("<p>Mine</p>", "html.parser")
    x.count_markup('Mine <b class="red">goes</b>', tree, ["Mine"], left_out)
    assert left_out == {"captions": 0, "markup": 4, "lost by the parser": 1}


def test_the_sample_is_clean_and_its_ledger_adds_up(tmp_path, capsys):
    flags = ["--public", str(SAMPLE / "public-blog"), "--private", str(SAMPLE / "private-blog")]
    train, val, report = run(tmp_path, *flags, "--author", "wrenlow")
    assert report["files_kept"] >= 60
    assert report["redactions"].keys() == {"email", "phone", "secret"}
    text = "\n".join(turn["content"] for line in train + val for turn in line["messages"])
    assert not re.search(r"\{[%:]|%\}|\[\^|</?(?:p|br|div|b|i|a)\b[^>]*>|\]\(|&#?\w+;|@example|555-01", text)

    # The ledger adds up.
    ledger = report["ledger"]
    kept = dict.fromkeys(("post", "reply"), 0)
    for line in train + val:
        kept[line["kind"]] += sum(x.count_words(turn["content"]) for turn in line["messages"][1::2])
    assert (ledger["kept_in_posts"], ledger["kept_in_replies"]) == tuple(kept.values())
    assert sum(report["words"].values()) == sum(kept.values())
    left_out = ledger["left_out"]
    assert ledger["found"] == sum(kept.values()) + sum(left_out.values())
    assert left_out.keys() >= {"other authors", "duplicates", "quotes", "code", x.UNUSED, "other people's comments"}
    assert "lost by the parser" not in left_out
    assert "joined or split where markup stood (the remainder)" not in left_out  # every word has a reason of its own

    for row in ledger["posts_that_lose_most"]:
        assert row["found"] == row["kept"] + sum(row["left_out"].values())
    printed = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.split("\n") if "left out: " in line]
    assert sum(int(number.replace(",", "")) for _, number in printed) == sum(left_out.values())


def test_a_post_that_is_empty_says_what_was_cleaned_away(tmp_path):
    files = {
        "_posts/2010-01-01-a.md": post("> all of it hers\n\n```\nx = 1\n```\n"),
        "_posts/2010-01-02-b.md": post("All of these words are mine."),
    }
    _, report = run_over(tmp_path, files)
    assert report["skipped"][0]["detail"] == "quotes 4, code 2"
