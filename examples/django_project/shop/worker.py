"""Sets Django up in a worker, as manage.py and wsgi.py do in their processes."""

import os

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
django.setup()
