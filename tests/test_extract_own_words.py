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
