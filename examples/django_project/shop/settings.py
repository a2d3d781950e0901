"""Django's settings, as short as they can be."""

from pathlib import Path

FOLDER = Path.cwd()
DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": FOLDER / "orders.db", "OPTIONS": {"timeout": 20}}
}
INSTALLED_APPS = ["orders"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "only an example"
USE_TZ = True
