"""What is the author's and what is somebody else's, where markup, themes and tools blur it."""

import pytest

import extract_blog_data as x


def text_of(body: str, is_html: bool = False, **meta: str) -> str:
    return x.to_text(x.strip_markup(body, meta), is_html)


QUOTES_IN_LISTS = [
    ("- soup\n\n  > hers\n- bread\n- jam", "- soup\n- bread\n- jam"),
    ("1. soup\n   > hers\n2. bread", "1. soup\n2. bread"),
    ("* soup\n    > hers,\n    and hers still\n* bread", "- soup\n- bread"),
    ("+ soup\n\n    > hers\n\n    mine\n\n+ bread", "- soup\n  mine\n- bread"),
    ("> hers\n# A heading of mine\n\nMine.", "A heading of mine\n\nMine."),
    ("> hers\n* * *\nMine.", "Mine."),
    ("> hers\ngoes on\n> to here\n\nMine.", "Mine."),
    ("- soup\n    >_< hot\n- bread", "- soup\n>_< hot\n- bread"),
]


@pytest.mark.parametrize(("body", "expected"), QUOTES_IN_LISTS)
def test_a_quote_ends_where_an_item_or_heading_of_the_authors_begins(body, expected):
    assert text_of(body) == expected


BROKEN_TAGS = [
    ("<img src='a.png'width=3>So it <b>was</b>.", "So it **was**."),
    ('See <a href="/x"b>the boat</a>, <font color="red"">red</font>.', "See the boat, red."),
    ('See <a href="/x" title="a" b">the boat</a>.', "See the boat."),
    ("i <3 you, 2 < 3 and 4 > 3 = so", "i <3 you, 2 < 3 and 4 > 3 = so"),
]


@pytest.mark.parametrize(("body", "expected"), BROKEN_TAGS)
def test_a_tag_with_a_mistake_is_no_text(body, expected):
    assert text_of(f"Well.\n\n{body}") == f"Well.\n\n{expected}"


OWN_BOXES = [
    ("> So it goes.\n{: .notice--info }", "So it goes."),
    ("{: .box-warning }\n> So it\ngoes.", "So it\ngoes."),
    ("> [!TIP]\n> So it goes.\n>\n> And so on.", "So it goes.\n\nAnd so on."),
    ("> [!info]- Heading\n> So it {% raw %}{{ x }}{% endraw %} goes.", "Heading\nSo it {{ x }} goes."),
    ('<blockquote class="alert"><p>So it goes.</p></blockquote>', "So it goes."),
    ("> [!QUOTE]\n> Theirs.", ""),
    ("> Theirs.\n{: .pull-quote-box }", ""),
    ("> Theirs.\n{: #hers .big }", ""),
    ("> Theirs, to note.\n\nMine.\n{: .notice }", "Mine."),
]


@pytest.mark.parametrize(("body", "expected"), OWN_BOXES)
def test_a_box_for_hints_is_the_authors_though_it_is_typed_as_a_quote(body, expected):
    assert text_of(body) == expected


ARGUMENTS = [
    ("{% include tip.html text='I wouldn\\'t go there, would you' %}", "I wouldn't go there, would you"),
    ('{% include x.md type="big one" body="Go.\n\nThen come *back* to me." %}', "Go.\n\nThen come *back* to me."),
    ('{% sidenote "n1" "This is what I said to her." %}', "This is what I said to her."),
    ('So {% newthought "it was in the end" %} that', "So it was in the end that"),
    ('{% include figure.html text="This is what I saw of it." %}', ""),
    ('{% include x.html alt="This is what I saw of it." %}', ""),
    ('{% include x.html text="This is what she wrote." author="Ann" %}', ""),
    ('{% include x.html file="the-end-of-it-all.png" class="a b c d" %}', ""),
    ('{% if page.x == "what I said to her" %}Mine.{% endif %}', "Mine."),
]


@pytest.mark.parametrize(("body", "expected"), ARGUMENTS)
def test_sentences_in_an_include_are_the_authors(body, expected):
    assert text_of(body) == expected


CAPTURES = [
    ("{% capture a-b %}It was all I had.{% endcapture %}\n<div>{{ a-b | markdownify }}</div>", "It was all I had."),
    ("{% capture x %}\nIt was *all* I had.\n{% endcapture %}\n{% include box.html text=x %}", "It was *all* I had."),
    ("{% capture x %}It was all I had.{% endcapture %}Mine.", "Mine."),
    ("{% capture x %}{{ site.url }}/a/b{% endcapture %}[Mine]({{ x }}).", "Mine."),
    ("{% capture x %}It was all I had.\n\nMine. {{ x }}", "It was all I had.\n\nMine."),
]


@pytest.mark.parametrize(("body", "expected"), CAPTURES)
def test_a_capture_that_is_output_is_the_authors(body, expected):
    assert text_of(body) == expected


def test_a_tag_that_begins_with_the_name_of_another_does_not_open_it():
    body = (
        "{% quote %}Hers {% quote-mark %} still.{% endquote %} Mine {% quote %}hers{% endquote-mark %}{% endquote %}."
    )
    assert text_of(body) == "Mine ."
