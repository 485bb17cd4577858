"""Names that servers and mail programs give to folders, in the languages that are common.

Mail programs: the names that Outlook, Thunderbird and Apple Mail make folders under. Exchange: the
names of its folders that hold no mail, which some versions list over IMAP, in the language in which
a mailbox was first opened.
"""

from __future__ import annotations

from collections.abc import Mapping

#: What people call the folder of a special use (RFC 6154 section 2), in lower case.
SPECIAL_USES: Mapping[str, frozenset[str]] = {
    "\\Sent": frozenset(
        {
            "sent", "sent items", "sent messages", "sent mail", "gesendet", "gesendete objekte", "gesendete elemente",
            "gesendete nachrichten", "éléments envoyés", "messages envoyés", "courrier envoyé", "envoyés",
            "elementos enviados", "mensajes enviados", "enviados", "posta inviata", "inviati", "messaggi inviati",
            "verzonden items", "verzonden berichten", "verzonden", "itens enviados", "mensagens enviadas", "skickat",
            "skickade objekt", "sendt post", "sendte elementer", "sendt", "lähetetyt", "elementy wysłane", "wysłane",
            "отправленные", "odeslaná pošta", "odeslané", "elküldött elemek", "elküldött", "gönderilmiş öğeler",
            "gönderilenler", "العناصر المرسلة", "المرسلة",
        }
    ),
    "\\Drafts": frozenset(
        {
            "drafts", "draft", "entwürfe", "brouillons", "borradores", "bozze", "concepten", "rascunhos", "utkast",
            "kladder", "luonnokset", "wersje robocze", "kopie robocze", "черновики", "koncepty", "rozepsané",
            "piszkozatok", "taslaklar", "المسودات",
        }
    ),
    "\\Trash": frozenset(
        {
            "trash", "deleted items", "deleted messages", "deleted", "papierkorb", "gelöschte objekte",
            "gelöschte elemente", "gelöscht", "corbeille", "éléments supprimés", "messages supprimés", "papelera",
            "elementos eliminados", "cestino", "posta eliminata", "prullenbak", "verwijderde items", "lixeira", "lixo",
            "itens excluídos", "itens eliminados", "borttaget", "papperskorgen", "slettet post", "slettede elementer",
            "papirkurv", "roskakori", "poistetut", "elementy usunięte", "kosz", "удаленные", "удалённые", "корзина",
            "odstraněná pošta", "koš", "törölt elemek", "kuka", "silinmiş öğeler", "çöp kutusu", "العناصر المحذوفة",
            "المهملات",
        }
    ),
    "\\Junk": frozenset(
        {
            "junk", "junk e-mail", "junk email", "junk mail", "spam", "bulk mail", "junk-e-mail", "spamverdacht",
            "spam-verdacht", "unerwünscht", "unerwünschte werbung", "courrier indésirable", "indésirables", "pourriel",
            "correo no deseado", "correo electrónico no deseado", "posta indesiderata", "ongewenste e-mail",
            "ongewenst", "lixo eletrônico", "lixo eletrónico", "correio electrónico não solicitado", "skräppost",
            "uønsket e-mail", "søppelpost", "uønsket e-post", "roskaposti", "wiadomości-śmieci", "спам",
            "нежелательная почта", "nevyžádaná pošta", "levélszemét", "gereksiz e-posta", "البريد غير الهام",
            "البريد العشوائي",
        }
    ),
    "\\Archive": frozenset(
        {
            "archive", "archives", "archiv", "archivio", "archivo", "archief", "arquivo", "arquivo morto", "arkiv",
            "arkisto", "archiwum", "архив", "archív", "archívum", "arşiv", "الأرشيف",
        }
    ),
}  # fmt: skip

#: Calendar, contacts, journal, notes and tasks, in lower case, by language (ISO 639-1).
EXCHANGE_ITEMS: Mapping[str, frozenset[str]] = {
    "ar": frozenset({"التقويم", "جهات الاتصال", "دفتر اليومية", "الملاحظات", "المهام"}),
    "cs": frozenset({"kalendář", "kontakty", "deník", "poznámky", "úkoly"}),
    "da": frozenset({"kalender", "kontaktpersoner", "journal", "noter", "opgaver"}),
    "de": frozenset({"kalender", "kontakte", "journal", "notizen", "aufgaben"}),
    "en": frozenset({"calendar", "contacts", "journal", "notes", "tasks"}),
    "es": frozenset({"calendario", "contactos", "diario", "notas", "tareas"}),
    "fi": frozenset({"kalenteri", "yhteystiedot", "päiväkirja", "muistilaput", "tehtävät"}),
    "fr": frozenset({"calendrier", "contacts", "journal", "notes", "tâches"}),
    "hu": frozenset({"naptár", "névjegyek", "napló", "feljegyzések", "feladatok"}),
    "it": frozenset({"calendario", "contatti", "diario", "note", "attività"}),
    "nb": frozenset({"kalender", "kontakter", "journal", "notater", "oppgaver"}),
    "nl": frozenset({"agenda", "contactpersonen", "logboek", "notities", "taken"}),
    "pl": frozenset({"kalendarz", "kontakty", "dziennik", "notatki", "zadania"}),
    "pt": frozenset({"calendário", "contactos", "contatos", "diário", "notas", "tarefas"}),
    "ru": frozenset({"календарь", "контакты", "дневник", "заметки", "задачи"}),
    "sv": frozenset({"kalender", "kontakter", "journal", "anteckningar", "uppgifter"}),
    "tr": frozenset({"takvim", "kişiler", "günlük", "notlar", "görevler"}),
}
#: So many of a language's names must be there for the folders to be Exchange's own, and not somebody's "Notes".
AT_LEAST = 3
