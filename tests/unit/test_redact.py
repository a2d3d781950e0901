"""No secret of a URL gets into an error, a log line or a table."""

import pytest

from leveret import App, ConfigurationError
from leveret.schemes import broker_module
from leveret.settings import redact


@pytest.mark.parametrize(
    "url",
    [
        "amqp://shop:hunter2@rabbit/vhost",
        "amqp://shop:hun@hunter2@rabbit/vhost",
        "amqp://shop:hun/hunter2@rabbit/vhost",
        "amqp://rabbit/vhost?password=hunter2",
        "amqp://rabbit/vhost?heartbeat=3&client_secret=hunter2&cafile=x",
    ],
)
def test_a_password_is_hidden_wherever_a_url_has_it(url: str) -> None:
    """It would stand in the logs of every worker, for all who may read them."""
    assert "hunter2" not in redact(f"connecting to {url} now")


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://shop:hunter2@one:5432,two/shop?schema=x",
        "postgresql:///shop?host=db&user=shop&password=hunter2",
        "postgresql://db/shop?sslpassword=hunter2&sslmode=require",
        "host=db user=shop password=hunter2 dbname=shop",
        "host=db password = 'hun ter hunter2' dbname=shop",
        r"host=db password='it\'s hunter2' dbname=shop",
        "host=db password='hunter2",
        'host=db password=a"hunter2 sslpassword=hunter2',
        "PGPASSWORD=hunter2 psql -h db",
    ],
)
def test_a_password_is_hidden_in_each_form_that_postgresql_has(text: str) -> None:
    """Drivers print what they were given, and libpq's form has no //."""
    shown = redact(f"connecting by {text} now")

    assert "hunter2" not in shown
    assert "db" in shown or "shop:***@one" in shown
    assert shown.endswith(" now") or text.endswith("'hunter2")
    assert redact(shown) == shown


def test_words_about_passwords_are_left() -> None:
    """Without them an error doesn't say what to do."""
    said = 'password authentication failed for user "shop"; set PGPASSWORD or passfile=/run/pg'

    assert redact(said) == said


@pytest.mark.parametrize(
    "url",
    [
        "amqp://shop:hunter2@a\u2100b/",
        "amqp://shop:hunter2/x@rabbit/",
        "amqp://rabbit/?password=hunter2",
        "amqp://shop:hunter2@[x/",
    ],
)
def test_a_url_that_cannot_be_used_does_not_show_its_password(url: str) -> None:
    """A typo in a deployment would print the secret instead of hiding it."""
    app = App("shop", broker=url)
    with pytest.raises(ConfigurationError) as refused:
        broker_module(url).open_broker(url, app.runtime())
    assert "hunter2" not in str(refused.value)
