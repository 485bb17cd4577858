-- Dovecot's Lua passdb and userdb (2.3 and 2.4), as a client of the authenticator.
--
-- Dovecot loads a file of the operator's, in which the global bascule_socket
-- is the path of the authenticator's socket, bascule_domains that of its list of
-- domains, and which then runs this one (see config_templates/dovecot/passdb.lua.j2).
-- Both must run in auth's worker processes, for the authenticator may take a while.
--
-- What is said on the socket is in hooks/protocol.py: netstrings of fields
-- between NULs. The password is written there and nowhere else.
--
-- While the authenticator does not answer, a file of its own does (hooks/deputy.py): below bascule_deputy, until the
-- moment in the file bascule_deputy_until. Nothing is decided here: what such a file does not say cannot be said now.
--
-- Names that are not in a domain of ours never wait for us: they go to the next
-- passdb or userdb at once. Those that are never go there, whatever the
-- operator's databases make of the name without its domain.

local connect = require "socket.unix"
local sleep = require "socket".sleep

local auth = dovecot.auth
local ANSWER = 2 -- seconds that the authenticator has to show that it is at work
local LOGIN = 60 -- seconds for a login from then on; it answers sooner by itself
local LISTING = 30 -- seconds for the list of all users
local NO_SUCH_FILE = 2 -- ENOENT of Linux
local SPARE = 512 * 1024 -- kB of memory that the host must have to spare for a password to be looked at; it takes 64 MiB
local LONGEST = 255 -- bytes of a file's name; who would need a longer one has none
local NOTHING = "" -- beside a failure 2.3 wants a string or a table, whose words it takes for fields; 2.4 a string or nil
-- Postfix (3.7 to 3.10) tells a client "wrong password" (535) when Dovecot says that it cannot say now, and the
-- truth (454) when Dovecot says nothing for ten seconds.
local SILENCE_FOR_POSTFIX = 12 -- seconds

-- From here bascule's check asks what the userdbs behind this one say: an address that nobody has (RFC 6666).
local CHECK = "100::ba5c"

-- The name with its domain. auth_username_format may have taken the domain away (Debian's LMTP does); a master user's
-- login has the master's name for the original one.
local function name_of(request)
  for _, name in ipairs({request.user or "", request.original_user or ""}) do
    if name:find("@", 1, true) then
      return name
    end
  end
end

-- Whether a name is in a domain of ours. nil: nobody knows, for there is no list yet.
local function is_ours(name)
  if not name then
    return false
  end
  local file = io.open(bascule_domains, "r")
  if not file then
    return nil
  end
  local domains = file:read("*a")
  file:close()
  return domains:find("\n" .. name:match("@([^@]*)$"):lower() .. "\n", 1, true) ~= nil
end

local function open(...)
  local payload = table.concat({...}, "\0")
  local connection = assert(connect())
  connection:settimeout(ANSWER)
  assert(connection:connect(bascule_socket))
  assert(connection:send(#payload .. ":" .. payload .. ","))
  return connection
end

local function reply_on(connection, patience)
  connection:settimeout(patience, "t")
  local answer = assert(connection:receive("*a"))
  connection:close()
  local length, reply = answer:match("^(%d+):(.*),$")
  if not reply or #reply ~= tonumber(length) then
    error("half an answer")
  end
  return reply
end

-- Lua functions that give the reply to each kind of request.
local function log_in(...)
  local connection = open("login", ...)
  if assert(connection:receive(3)) ~= "0:," then
    error("not at work")
  end
  return reply_on(connection, LOGIN)
end

local function look_up(...)
  return reply_on(open(...), ANSWER)
end

local function list()
  return reply_on(open("users"), LISTING)
end

-- The reply, or nil, for there is none.
local function asked(ask, ...)
  local answered, reply = pcall(ask, ...)
  if answered then
    return reply
  end
  dovecot.i_error("bascule: the authenticator does not answer: " .. tostring(reply))
end

-- What a file has in it. nil, and whether that is because it does not exist.
local function content_of(path)
  local file, _, number = io.open(path, "rb")
  if not file then
    return nil, number == NO_SUCH_FILE
  end
  local content = file:read("*a")
  file:close()
  return content, false
end

local function encoded(part)
  local text = part:gsub("[^a-z0-9_.~-]", function(byte)
    return string.format("%%%02X", byte:byte())
  end)
  return (text:gsub("^%.", "%%2E"))
end

-- What is left of a user: the replies, by request and service, and the hash of the password.
local function left_of(name)
  local good_until = tonumber((content_of(bascule_deputy_until)))
  if not good_until or os.time() >= good_until then
    error("what it left is too old")
  end
  -- Other names cannot have moved, and what the authenticator would make of them is not for us to guess.
  local local_part, domain = name:lower():match("^([!#-~]+)@([!#-~]+)$")
  if not local_part then
    error("a name that it must be asked about")
  end
  local mine, theirs = encoded(local_part) .. "@" .. encoded(domain), "@" .. encoded(domain)
  if #mine > LONGEST then
    error("a name that is too long")
  end
  local content, absent = content_of(bascule_deputy .. "/" .. mine)
  local everybody = not content and absent
  if everybody then
    content = content_of(bascule_deputy .. "/" .. theirs)
  end
  if not content then
    error("it left nothing")
  end
  local left, at = {}, 1
  while at <= #content do
    local length, start = content:match("^(%d+):()", at)
    local stop = start and start + tonumber(length)
    if not stop or content:sub(stop, stop) ~= "," then
      error("what it left is not whole")
    end
    local key, word, reply = content:sub(start, stop - 1):match("^([^%z]*)%z([^%z]*)%z?(.*)$")
    if key == "password" then
      left.password = word
    else
      if everybody then
        reply = reply:gsub("%*", function()
          return local_part
        end)
      end
      left[key .. " " .. word] = reply
    end
    at = stop + 1
  end
  return left
end

local function reply_left(left, request, service)
  return left[request .. " " .. service] or left[request .. " *"] or "temporary"
end

-- The authenticator looks at a few passwords at a time. Here each login has a worker for itself.
local function has_memory()
  local available = (content_of("/proc/meminfo") or ""):match("MemAvailable:%s*(%d+)")
  return not available or tonumber(available) >= SPARE
end

-- As log_in, look_up: by what is left.
local function log_in_alone(request, name, password, service)
  local left = left_of(name)
  if left.password then
    if not has_memory() then
      error("too little memory to look at a password")
    end
    local matches, why = request:password_verify(left.password, password)
    if matches == 0 and not tostring(why):find("^Unknown scheme") then
      return "refused"
    elseif matches ~= 1 then
      error("the password cannot be verified: " .. tostring(why))
    end
  end
  return reply_left(left, "login", service)
end

local function look_up_alone(database, name, service)
  local reply = reply_left(left_of(name), database, service)
  if database == "passdb" and reply:match("^ok") then
    -- Dovecot wants a password, which is compared with nothing but what a mechanism other than PLAIN was sent.
    local random = assert(io.open("/dev/urandom", "rb"))
    local secret = random:read(32):gsub(".", function(byte)
      return string.format("%02x", byte:byte())
    end)
    random:close()
    reply = reply .. "\0password={PLAIN}" .. secret
  end
  return reply
end

local function alone(answer, ...)
  local answered, reply = pcall(answer, ...)
  if answered then
    return reply
  end
  dovecot.i_error("bascule: nor can it be said without it: " .. tostring(reply))
  return "temporary"
end

local function fields_of(reply)
  local fields = {}
  for name, value in reply:gmatch("%z([^=%z]+)=([^%z]*)") do
    fields[name] = value
  end
  return fields
end

local function passdb_result(reply, service)
  local result = reply:match("^[^%z]*")
  if result == "ok" then
    return auth.PASSDB_RESULT_OK, fields_of(reply)
  elseif result == "refused" then
    return auth.PASSDB_RESULT_PASSWORD_MISMATCH, NOTHING
  elseif result == "unknown" then
    return auth.PASSDB_RESULT_NEXT, NOTHING
  elseif service == "smtp" then
    sleep(SILENCE_FOR_POSTFIX)
  end
  return auth.PASSDB_RESULT_INTERNAL_FAILURE, "it cannot be said now"
end

function auth_password_verify(request, password)
  local name = name_of(request)
  if is_ours(name) == false then
    return auth.PASSDB_RESULT_NEXT, NOTHING
  end
  local service = request.protocol or request.service or ""
  local source = request.remote_ip or request.rip or ""
  local reply = asked(log_in, name, password, service, source) or alone(log_in_alone, request, name, password, service)
  return passdb_result(reply, service)
end

-- Without a password: a master user's login, or LMTP that asks where to proxy to.
function auth_passdb_lookup(request)
  local name = name_of(request)
  if is_ours(name) == false then
    return auth.PASSDB_RESULT_NEXT, NOTHING
  end
  local service = request.protocol or request.service or ""
  local reply = asked(look_up, "passdb", name, service) or alone(look_up_alone, "passdb", name, service)
  return passdb_result(reply)
end

-- A userdb has no "next": unknown is that, and who is ours and not here is a temporary failure, which goes no further.
function auth_userdb_lookup(request)
  local name = name_of(request)
  if is_ours(name) == false or (request.remote_ip or request.rip) == CHECK then
    return auth.USERDB_RESULT_USER_UNKNOWN, NOTHING
  end
  local service = request.protocol or request.service or ""
  local reply = asked(look_up, "userdb", name, service) or alone(look_up_alone, "userdb", name, service)
  local result = reply:match("^[^%z]*")
  if result == "ok" then
    local fields = fields_of(reply)
    for field, value in pairs(fields) do
      if value == "" and not request.protocol then
        fields[field] = nil -- 2.3 takes an empty value for "yes"
      end
    end
    return auth.USERDB_RESULT_OK, fields
  elseif result == "unknown" then
    return auth.USERDB_RESULT_USER_UNKNOWN, NOTHING
  end
  return auth.USERDB_RESULT_INTERNAL_FAILURE, result == "refused" and "no mailbox here" or "it cannot be said now"
end

function auth_userdb_iterate()
  local users = {}
  local reply = list()
  if not reply:match("^ok") then
    error("the users cannot be listed now")
  end
  for user in reply:gmatch("%z([^%z]+)") do
    users[#users + 1] = user
  end
  return users
end
