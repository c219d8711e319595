// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <utility>

#include "daemon/config/config.h"
#include "daemon/config/keys.h"
#include "daemon/config/toml_file.h"
#include "daemon/config/value.h"

namespace expertd::config {

namespace {

constexpr size_t kMaxMistakes = 20;     // reported at once; the rest shows after the first are mended
constexpr size_t kMaxSocketPath = 107;  // sun_path without its terminating zero
constexpr std::string_view kDefaultOrigin = "default";

struct Setting {
  Value value;
  std::string origin{kDefaultOrigin};
  std::string place;  // what a message about this value starts with
};

/// Collects the settings in the order of the table, lowest precedence first, and every mistake on
/// the way.
class Loader {
 public:
  Loader() : settings_(keys().size()) {
    for (size_t i = 0; i < settings_.size(); ++i) {
      settings_[i].value = default_value(keys()[i]);
    }
  }

  void read_file(const std::string& path, std::string_view text);
  void read_environment(const EnvironmentLookup& environment);
  void read_flags(const std::vector<std::pair<std::string, std::string>>& flags);
  void add_mistake(const base::Status& mistake);
  base::Result<LoadedConfig> finish(std::string file);

 private:
  void read_entry(const std::string& path, const FileEntry& entry);
  void refuse_unknown(const std::string& path, const FileEntry& entry);
  void set(const Key& key, std::string_view text, std::string origin, std::string place);
  Setting& setting(std::string_view full_name);
  void resolve_socket(std::string_view name, std::string_view file_name);
  void check_together();

  std::vector<Setting> settings_;
  std::vector<std::string> mistakes_;
  base::Reason first_reason_ = EXPERTD_REASON_NONE;
};

base::Status unknown_key(std::string_view section, std::string_view name) {
  const std::string full = section.empty() ? std::string(name) : std::string(section) + "." + std::string(name);
  std::string message = "unknown key " + quote(full);
  const std::string nearest = nearest_key(section, name);
  if (!nearest.empty()) {
    message += ", nearest " + quote(nearest);
  } else {
    message += "; --print-config=example lists every key";
  }
  return base::Status(EXPERTD_REASON_CONFIG_UNKNOWN_KEY, message);
}

base::Status unknown_section(std::string_view name) {
  std::string message = "unknown section " + quote(name);
  const std::string nearest = nearest_section(name);
  if (!nearest.empty()) {
    message += ", nearest " + quote(nearest);
  }
  return base::Status(EXPERTD_REASON_CONFIG_UNKNOWN_KEY, message);
}

std::string place_text(const std::string& path, Place place) {
  return path + ":" + std::to_string(place.line) + ":" + std::to_string(place.column);
}

bool accepts(Type type, const FileEntry& entry) {
  const NodeKind kind = entry.kind;
  switch (type) {
    case Type::kBool:
      return kind == NodeKind::kBoolean;
    case Type::kInteger:
    case Type::kPowerOfTwo:
      return kind == NodeKind::kInteger;
    case Type::kDuration:
    case Type::kSize:
      return kind == NodeKind::kInteger || kind == NodeKind::kString;
    case Type::kIntegerList:
      return kind == NodeKind::kIntegerArray;
    case Type::kTextList:
      return kind == NodeKind::kStringArray || (kind == NodeKind::kIntegerArray && entry.text.empty());
    case Type::kMode:
    case Type::kChoice:
    case Type::kString:
    case Type::kPath:
    case Type::kAddress:
    case Type::kGpus:
      return kind == NodeKind::kString;
  }
  return false;
}

void Loader::add_mistake(const base::Status& mistake) {
  first_reason_ = mistakes_.empty() ? mistake.reason() : first_reason_;
  mistakes_.push_back(mistake.message());
}

void Loader::set(const Key& key, std::string_view text, std::string origin, std::string place) {
  base::Result<Value> value = parse_value(key, text);
  if (!value.is_ok()) {
    add_mistake(value.status().with_context(full_name(key)).with_context(place));
    return;
  }
  const auto index = static_cast<size_t>(&key - keys().data());
  settings_[index] = Setting{std::move(value).value(), std::move(origin), std::move(place)};
}

void Loader::refuse_unknown(const std::string& path, const FileEntry& entry) {
  const bool is_table = entry.section.empty() && entry.kind == NodeKind::kTable;
  const base::Status mistake = is_table ? unknown_section(entry.name) : unknown_key(entry.section, entry.name);
  add_mistake(mistake.with_context(place_text(path, entry.key_place)));
}

void Loader::read_entry(const std::string& path, const FileEntry& entry) {
  if (entry.section.empty() && is_section(entry.name)) {
    if (entry.kind != NodeKind::kTable) {
      add_mistake(base::Status(
          EXPERTD_REASON_CONFIG_BAD_VALUE,
          place_text(path, entry.key_place) + ": " + quote(entry.name) + " is a section: write [" + entry.name + "]"));
    }
    return;
  }
  if (!entry.section.empty() && !is_section(entry.section)) {
    return;  // its section was refused already
  }
  const Key* key = find_key(entry.section, entry.name);
  if (key == nullptr) {
    refuse_unknown(path, entry);
    return;
  }
  const std::string place = place_text(path, entry.value_place);
  if (!accepts(key->type, entry)) {
    add_mistake(base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE, place + ": " + full_name(*key) + ": found " +
                                                                  std::string(node_kind_name(entry.kind)) +
                                                                  ", wanted " + describe_allowed(*key)));
    return;
  }
  set(*key, entry.text, "file " + path + ":" + std::to_string(entry.key_place.line), place);
}

void Loader::read_file(const std::string& path, std::string_view text) {
  base::Result<std::vector<FileEntry>> entries = parse_toml(text, path);
  if (!entries.is_ok()) {
    add_mistake(entries.status());
    return;
  }
  // toml++ hands keys out in alphabetical order; mistakes read better in the order of the file.
  std::stable_sort(entries.value().begin(), entries.value().end(), [](const FileEntry& a, const FileEntry& b) {
    return std::pair(a.key_place.line, a.key_place.column) < std::pair(b.key_place.line, b.key_place.column);
  });
  for (const FileEntry& entry : entries.value()) {
    read_entry(path, entry);
  }
}

void Loader::read_environment(const EnvironmentLookup& environment) {
  if (!environment) {
    return;
  }
  for (const Key& key : keys()) {
    for (const std::string& name : {std::string(key.short_environment), environment_name(key)}) {
      const std::optional<std::string> text = name.empty() ? std::nullopt : environment(name);
      if (text.has_value()) {
        set(key, *text, "environment " + name, "environment " + name);
      }
    }
  }
}

void Loader::read_flags(const std::vector<std::pair<std::string, std::string>>& flags) {
  for (const auto& [name, text] : flags) {
    const Key* key = find_key(name);
    if (key != nullptr) {
      const std::string origin = "flag " + flag_name(*key);
      set(*key, text, origin, origin);
      continue;
    }
    const size_t dot = name.find('.');
    const std::string section = dot == std::string::npos ? "" : name.substr(0, dot);
    const base::Status mistake =
        section.empty() || is_section(section) ? unknown_key(section, name.substr(dot + 1)) : unknown_section(section);
    add_mistake(mistake.with_context("flag --set " + name));
  }
}

Setting& Loader::setting(std::string_view full_name) {
  return settings_[static_cast<size_t>(find_key(full_name) - keys().data())];
}

void Loader::resolve_socket(std::string_view name, std::string_view file_name) {
  Setting& socket = setting(name);
  const Setting& directory = setting("runtime_directory");
  const bool derived = socket.value.text.empty();
  if (derived) {
    socket.value.text = directory.value.text + "/" + std::string(file_name);
  }
  if (socket.value.text.size() > kMaxSocketPath) {
    base::Status mistake(EXPERTD_REASON_CONFIG_BAD_VALUE, std::string(name) + ": " + quote(socket.value.text) +
                                                              " has " + std::to_string(socket.value.text.size()) +
                                                              " bytes; the path of a socket has at most " +
                                                              std::to_string(kMaxSocketPath));
    const std::string& place = derived ? directory.place : socket.place;
    add_mistake(place.empty() ? mistake : mistake.with_context(place));
  }
}

void Loader::check_together() {
  resolve_socket("control.socket", "control.sock");
  resolve_socket("control.attach_socket", "attach.sock");
  const auto refuse = [this](const std::string& place, const std::string& message) {
    const base::Status mistake(EXPERTD_REASON_CONFIG_BAD_VALUE, message);
    add_mistake(place.empty() ? mistake : mistake.with_context(place));
  };
  if (setting("control.socket").value.text == setting("control.attach_socket").value.text) {
    refuse(setting("control.attach_socket").place, "control.attach_socket: is the same path as control.socket");
  }
  const Setting& pool = setting("device.pool_bytes");
  if (!pool.value.automatic) {
    refuse(pool.place,
           "device.pool_bytes: only \"auto\" is served, memory is taken when it is asked for; device.pool_max_bytes "
           "caps it");
  }
  const Setting& gpus = setting("device.gpus");
  const Setting& hosts = setting("device.hosts");
  if (gpus.value.text == "none" && hosts.value.integer == 0) {
    refuse(hosts.place, "device.hosts: 0 together with device.gpus \"none\" leaves nothing to serve");
  }
  const Setting& fabric = setting("fabric.enabled");
  const Setting& rendezvous = setting("fabric.rendezvous");
  const std::vector<std::string>& places = rendezvous.value.texts;
  const Setting& etcd = setting("fabric.etcd");
  if (fabric.value.integer != 0 && places.empty() && etcd.value.texts.empty()) {
    refuse(fabric.place,
           "fabric.enabled: needs fabric.rendezvous, the daemons at which the ranks of a group find each other, or "
           "fabric.etcd, where they elect one");
  }
  if (!places.empty() && !etcd.value.texts.empty()) {
    refuse(etcd.place, "fabric.etcd: is given together with fabric.rendezvous; remove one of the two");
  }
  const bool has_name = std::ranges::any_of(places, [](const std::string& place) { return place.starts_with("dns:"); });
  if (has_name && places.size() > 1) {
    refuse(rendezvous.place, "fabric.rendezvous: a \"dns:\" entry stands for every daemon, so it must be the only one");
  }
}

base::Result<LoadedConfig> Loader::finish(std::string file) {
  if (mistakes_.empty()) {
    check_together();
  }
  if (!mistakes_.empty()) {
    std::string message;
    for (size_t i = 0; i < std::min(mistakes_.size(), kMaxMistakes); ++i) {
      message.append(i == 0 ? "" : "\n").append(mistakes_[i]);
    }
    if (mistakes_.size() > kMaxMistakes) {
      message += "\nand " + std::to_string(mistakes_.size() - kMaxMistakes) + " more";
    }
    return base::Status(first_reason_, message);
  }
  LoadedConfig loaded;
  loaded.file = std::move(file);
  for (size_t i = 0; i < settings_.size(); ++i) {
    const Key& key = keys()[i];
    key.set(loaded.config, settings_[i].value);
    loaded.report.push_back({full_name(key), format_value(key, settings_[i].value), settings_[i].origin});
  }
  return loaded;
}

}  // namespace

base::Result<LoadedConfig> load(const LoadRequest& request) {
  Loader loader;
  std::string file;
  base::Result<std::optional<std::string>> text = read_text(request.path);
  if (!text.is_ok()) {
    loader.add_mistake(text.status());
  } else if (text.value().has_value()) {
    file = request.path;
    loader.read_file(request.path, *text.value());
  } else if (request.path_given) {
    loader.add_mistake(
        base::Status(EXPERTD_REASON_CONFIG_UNREADABLE, request.path + ": no such file; it was named by --config"));
  }
  loader.read_environment(request.environment);
  loader.read_flags(request.flags);
  return loader.finish(std::move(file));
}

Config defaults() {
  base::Result<LoadedConfig> loaded = Loader().finish("");
  return loaded.is_ok() ? std::move(loaded).value().config : Config{};
}

Difference compare(const std::vector<KeyReport>& running, const std::vector<KeyReport>& fresh) {
  Difference difference;
  for (const KeyReport& now : fresh) {
    const auto before =
        std::find_if(running.begin(), running.end(), [&](const KeyReport& r) { return r.name == now.name; });
    const Key* key = find_key(now.name);
    if (key == nullptr || (before != running.end() && before->value == now.value)) {
      continue;
    }
    (key->reloadable ? difference.reloadable : difference.restart_required).push_back(now.name);
  }
  return difference;
}

}  // namespace expertd::config
