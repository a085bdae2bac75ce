"""The code that keeps what was built: schema, migrations, writer, blob store. Its data's default place is `./catalog`.

May not import other stages; the loader reads the same schema with the standard library alone
(`llmbuild.runtime.reader`).
"""
